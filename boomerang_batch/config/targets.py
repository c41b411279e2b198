"""What codes are decoded to: another class, prompt or model, and how."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from boomerang_batch.config.blocks import ModelSpec
from boomerang_batch.config.forms import Block


class Target(Block):
    """What a code is decoded to, instead of to its own image."""

    label: int | None = Field(None, ge=0, description="the class that all become")
    prompt: str | None = Field(None, description="the prompt that all are decoded under")
    field: str | None = Field(None, description="field that holds each sample's own class or prompt to become")
    guidance: float | None = Field(
        None, ge=0, description="classifier-free guidance weight while decoding; null: the model's own"
    )
    model: ModelSpec | None = Field(None, description="another model to decode with; null: `model`")

    @model_validator(mode="after")
    def _one_target(self) -> Target:
        told = 3 - [self.label, self.prompt, self.field].count(None)
        if told > 1 or (not told and self.model is None):
            raise ValueError("a target is one of label, prompt and field, or another model")
        return self

    @model_validator(mode="after")
    def _model_is_whole(self) -> Target:
        if self.model is None:
            return self
        if self.guidance is not None:
            raise ValueError(
                "guidance is of the model itself, and another model has its own: say it in model.class_labels "
                "or model.prompts of the target"
            )
        if self.model.safety != "unchecked":
            raise ValueError(
                "outputs are shown to the recipe's own model.safety: remove safety from the target"
            )
        return self

    def canonical(self) -> dict[str, Any]:
        """What of it enters the recipe's canonical form: what came later only where it is said."""
        full = self.model_dump(mode="json")
        return {name: value for name, value in full.items() if value is not None or name in _FIRST}


_FIRST = frozenset({"label", "prompt", "field"})
"""What a target has always had; runs are known by their digest."""
