"""The quantised base to which an adapter belongs that began with what the quantisation lost (LoftQ)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from na_lora_lightning.errors import ConfigurationError, one_line

# Beside the adapter, as PEFT's own file has no place for it.
FILE = "base_quantization.json"


@dataclass(frozen=True)
class BaseQuantization:
    """In what form a base has the weights that it had when an adapter began.

    What they are turned into to compute is not part of it, as that leaves them as they are.

    Attributes:
        kind: ``"nf4"`` or ``"fp4"``.
        double: Whether the scales are quantised too.
    """

    kind: str
    double: bool

    @classmethod
    def of_folder(cls, folder: Path) -> BaseQuantization | None:
        """What an adapter folder says; None where the adapter is for its base in any form.

        Raises:
            ConfigurationError: It cannot be read.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(values["kind"]), bool(values["double"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigurationError(
                f"{FILE} of the adapter {str(folder)!r} cannot be read ({one_line(error)}); copy it again from where "
                "the adapter was trained."
            ) from error

    def write(self, folder: Path) -> None:
        """Puts it into an adapter folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @property
    def settings(self) -> str:
        """What to do so that a module has such a base."""
        return f"set quantization.kind to {self.kind!r} and quantization.double to {str(self.double).lower()}"

    @property
    def arguments(self) -> str:
        """The arguments of a command that make such a base."""
        return f"--quantization {self.kind}" + ("" if self.double else " --no_double_quantization")

    def require(self, what: str, kind: str | None, double: bool, remedy: str) -> None:
        """Checks that a base is held so.

        Args:
            what: What belongs to it, as the beginning of a sentence.
            kind: In what form the base is held; None stands for that in which it is stored.
            double: Whether the scales are quantised too.
            remedy: The end of the sentence.

        Raises:
            ConfigurationError: It is held otherwise, so that what the quantisation lost would count twice, or a part
                of it not at all.
        """
        if (kind, double) != (self.kind, self.double):
            raise ConfigurationError(
                f"{what} began with what {_form(self.kind, self.double)} lost of its base (LoftQ), so that it is wrong "
                f"on the base {'as it is stored' if kind is None else f'in {_form(kind, double)}'}; {remedy}."
            )


def _form(kind: str, double: bool) -> str:
    return f"{kind} with{'' if double else 'out'} double quantisation" if kind in ("nf4", "fp4") else kind
