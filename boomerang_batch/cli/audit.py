"""`boomerang-batch audit`: how private and how good is an output, measured?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from boomerang_batch.cli.inputs import rig_options

if TYPE_CHECKING:
    from boomerang_batch.data.manifest import Manifest


@click.command()
@click.argument("out")
@click.option("--against", required=True, metavar="MANIFEST", help="The manifest that the run read.")
@click.option("--private-dir", metavar="DIR", help="The run's private dir; anonymized outputs need it.")
@click.option(
    "--embedder",
    "embedders",
    multiple=True,
    default=("pixels", "pca"),
    show_default=True,
    metavar="NAME",
    help="Features to compare in; give several, for one alone reports more anonymity than there is.",
)
@click.option(
    "--classifier",
    "classifiers",
    multiple=True,
    metavar="NAME",
    help="An installed classifier to tell labels by, beside those trained on the features.",
)
@click.option(
    "--training",
    metavar="MANIFEST",
    help="The model's own training images: tell copies of them too.",
)
@click.option(
    "--holdout",
    metavar="MANIFEST",
    help="Real images that were no sources: tell by them what is near.  [default: by the sources]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=3),
    default=1000,
    show_default=True,
    help="Outputs to look at, whole shards of them; and training and hold-out images, of each as many.",
)
@click.option(
    "--redraw",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="How many outputs to draw anew for the controls at t = 0 and t = T and the re-run attack; 0: none.",
)
@click.option("--max-rank1", type=click.FloatRange(0, 1), help="Gate: outputs led back to their own source.")
@click.option("--max-tar", type=click.FloatRange(0, 1), help="Gate: accepted at a false-accept rate of .01.")
@click.option(
    "--max-fd", type=click.FloatRange(min=0), help="Gate: Frechet distance in each embedder's features."
)
@click.option("--min-label-agreement", type=click.FloatRange(0, 1), help="Gate: outputs that keep their label.")
@click.option(
    "--save", metavar="FILE", help="Where the findings go.  [default: audit.json in the private dir, else OUT]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@rig_options
@click.pass_context
def audit(
    context: click.Context,
    out: str,
    against: str,
    private_dir: str | None,
    embedders: tuple[str, ...],
    classifiers: tuple[str, ...],
    training: str | None,
    holdout: str | None,
    samples: int,
    redraw: int,
    max_rank1: float | None,
    max_tar: float | None,
    max_fd: float | None,
    min_label_agreement: float | None,
    save: str | None,
    as_json: bool,
    model: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Measure the output in OUT: who is linked to a source, what is copied, what use is left.

    A gate is kept by the bad end of a 95 % interval. Exit code 4: one is broken; 1: none is, but one had
    nothing to go by.

    \b
    Examples:
      boomerang-batch audit out --private-dir private --against manifest.yaml
      boomerang-batch audit out --private-dir private --against demo --embedder efficientnet-lite0 \\
        --embedder pixels --max-rank1 .05 --min-label-agreement .8
    """
    from boomerang_batch import storage
    from boomerang_batch.audit.audit import AuditRequest
    from boomerang_batch.audit.audit import audit as measure
    from boomerang_batch.audit.findings import AUDIT_NAME
    from boomerang_batch.audit.origin import is_private
    from boomerang_batch.audit.words import describe
    from boomerang_batch.config.blocks import Gates
    from boomerang_batch.errors import ConfigError, MeasureError
    from boomerang_batch.run.record import require_record

    anonymized = is_private(require_record(out))
    place = save or storage.join(private_dir if anonymized and private_dir else out, AUDIT_NAME)
    if save and (anonymized or storage.exists(save)) and list(storage.lying_in(out, [save])):
        raise ConfigError(f"--save {save} lies in OUT ({out}), to which it does not belong; put it elsewhere")
    findings = measure(
        AuditRequest(
            out=out,
            manifest=_manifest("--against", against),
            private_dir=private_dir,
            embedders=tuple(dict.fromkeys(embedders)),
            classifiers=tuple(dict.fromkeys(classifiers)),
            training=None if training is None else _manifest("--training", training),
            holdout=None if holdout is None else _manifest("--holdout", holdout),
            samples=samples,
            redraws=redraw,
            gates=Gates(
                max_rank1=max_rank1,
                max_tar=max_tar,
                max_fd=max_fd,
                min_label_agreement=min_label_agreement,
            ),
            model=model,
            device=device,
            threads=threads,
        )
    )
    storage.publish_bytes(findings.to_bytes(), place)
    click.echo(findings.to_bytes().decode() if as_json else describe(findings), nl=not as_json)
    if any(gate.broken for gate in findings.gates):
        context.exit(4)
    if findings.unjudged:
        raise MeasureError("; ".join(findings.unjudged))


def _manifest(flag: str, ref: str) -> Manifest:
    """The manifest that a flag names, of which there are several."""
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.errors import ManifestError, StorageError

    try:
        return load_manifest(ref)
    except (ManifestError, StorageError) as error:
        raise type(error)(f"{flag}: {error}") from error
