"""The base of all sections of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
MixedPrecision = Annotated[
    bool | Literal["always"],
    Field(description="bfloat16 autocast; true: on a GPU alone, always: on a CPU, too"),
]


class Section(BaseModel):
    """Base of all sections: frozen; unknown keys, infinity and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
