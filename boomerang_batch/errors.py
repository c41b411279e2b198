"""Every error a user can cause or meet, as one tree.

    BoomerangError                 exit 1   anything this tool refuses or fails at, in one clear line
    ├── ConfigError                exit 2   what the user wrote: recipe, manifest, flag, environment
    │   ├── RecipeError                     a pipeline file or a --set that can't be meant
    │   ├── ManifestError                   a manifest that can't be read or contradicts itself
    │   ├── RunMismatchError                OUT already holds a run of something else
    │   ├── PrivateDirError                 the private dir or its secret is missing or unfit
    │   └── ModelError                      weights that can't be loaded, or asked for what they can't do
    ├── StorageError               exit 1   a read or a write that failed, naming the URL
    │   ├── ObjectExistsError               a create-only write that came second
    │   └── ObjectMissingError              nothing is at that path
    ├── ShardError                 exit 1   a shard that can't be processed at all
    ├── SampleError                exit 3   one sample that can't be processed: becomes a provenance row
    ├── VerificationError          exit 1   an output that is not what its records say
    ├── MeasureError               exit 1   a measure that can't be taken, or would mean nothing
    ├── GateError                  exit 4   outputs that do not keep the limits they were to keep
    └── StoppedError               exit 75  asked to stop, or no worker came; what is committed stays
        └── LeaseError                      another run holds OUT, or has taken it over

The command line catches `BoomerangError` alone, prints its message and exits with its code; anything else is
a bug and keeps its traceback.
"""

from __future__ import annotations


class BoomerangError(Exception):
    """A failure with a message fit to be shown: it names the file, shard or key, and the fix."""

    exit_code = 1


class ConfigError(BoomerangError):
    exit_code = 2


class RecipeError(ConfigError):
    pass


class ManifestError(ConfigError):
    pass


class RunMismatchError(ConfigError):
    pass


class PrivateDirError(ConfigError):
    pass


class ModelError(ConfigError):
    pass


class StorageError(BoomerangError):
    pass


class ObjectExistsError(StorageError):
    pass


class ObjectMissingError(StorageError):
    pass


class ShardError(BoomerangError):
    pass


class SampleError(BoomerangError):
    """One sample that can't be processed.

    `reason` is a short kebab-case word that ends up in the provenance row and can be counted; `detail`
    is the sentence for a person. Under `purpose: anonymize` the detail is never written to OUT.
    """

    exit_code = 3

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class VerificationError(BoomerangError):
    pass


class MeasureError(BoomerangError):
    pass


class GateError(BoomerangError):
    exit_code = 4


class StoppedError(BoomerangError):
    exit_code = 75


class LeaseError(StoppedError):
    pass
