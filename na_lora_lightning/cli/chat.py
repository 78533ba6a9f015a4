"""``na-lora chat``: talks with a model or an adapter in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_lora_lightning.cli.errors import CommandParser
from na_lora_lightning.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.table import Table

    from na_lora_lightning.cli.speaker import AnswerSettings, Speaker

_HELP = """\
/image FILE    put an image before your next message
/system TEXT   begin anew with another system prompt; without a text, with none
/new           begin anew
/quit          end, as Ctrl-D does; Ctrl-C ends an answer
//...          a message that begins with a slash"""
_WIDTH_OF_FILES = 80


class Conversation:
    """What was said, from one side.

    Args:
        speaker: Who answers.
        settings: How.
        system: The system prompt, if there is one.
        adapted: Whether the adapter has a part in answers.
    """

    def __init__(
        self, speaker: Speaker, settings: AnswerSettings, system: str | None = None, adapted: bool = True
    ) -> None:
        self.speaker, self.settings, self.adapted = speaker, settings, adapted
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.images: list[Image] = []

    def reply(self, text: str, images: list[Image], write: Callable[[str], None]) -> str:
        """Says something, with images before it, and returns the answer; both are then part of the conversation.

        Raises:
            DataError: The model cannot take it; nothing is then part of it.
        """
        question = self._message("user", text, len(images))
        start = [] if self.system is None else [self._message("system", self.system)]
        earlier = self.messages if self.speaker.has_template else []
        inputs = self.speaker.inputs_of([*start, *earlier, question], [*self.images, *images])
        answer = self.speaker.answer(inputs, self.settings, write, self.adapted)
        self.messages += [question, self._message("assistant", answer)]
        self.images += images
        return answer

    def forget(self) -> None:
        """Begins anew."""
        self.messages, self.images = [], []

    def _message(self, role: str, text: str, images: int = 0) -> dict[str, Any]:
        if not (self.speaker.takes_images and self.speaker.has_template):
            return {"role": role, "content": text}
        return {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


class Chat:
    """Reads lines and prints answers, of one conversation or of two side by side.

    Args:
        conversations: One, or that of the base model and that of the adapted one.
        console: Where to.
    """

    def __init__(self, conversations: list[Conversation], console: Console) -> None:
        self.conversations, self.console = conversations, console
        self._images: list[Any] = []

    def take(self, line: str) -> bool:
        """Does what a line asks for, and says whether to go on."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._say(line[1:] if line.startswith("//") else line)
            return True
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/image":
            self._take_image(rest.strip())
        elif command in ("/system", "/new"):
            self._images = []
            for conversation in self.conversations:
                conversation.forget()
                if command == "/system":
                    conversation.system = rest.strip() or None
            self._note("A new conversation.")
        else:
            self._note(_HELP if command == "/help" else f"There is no command {command}; /help lists them.")
        return True

    def _take_image(self, path: str) -> None:
        from na_lora_lightning.data.image_reading import ImageReader

        if not self.conversations[0].speaker.takes_images:
            self._note("This model takes no images.")
            return
        try:
            image = ImageReader(Path()).read(str(Path(path).expanduser()))
        except DataError as error:
            self._note(f"No image: it {error}.")
            return
        self._images.append(image)
        self._note(f"Your next message has {len(self._images)} image(s), the last of {image.width} × {image.height}.")

    def _say(self, text: str) -> None:
        images, self._images = self._images, []
        try:
            if len(self.conversations) == 1:
                self.conversations[0].reply(text, images, self._write)
                self.console.print()
            else:
                self._compare(text, images)
        except DataError as error:
            self._note(f"Your message cannot be answered: it {str(error).rstrip('.')}. /new begins anew.")

    def _write(self, text: str) -> None:
        # As it is, however long its lines are, so that it can be copied.
        self.console.out(text, end="", highlight=False)

    def _compare(self, text: str, images: list[Any]) -> None:
        from rich.live import Live

        answers = ["", ""]
        # A screen shows the end of a long answer while it comes; then all of it is printed.
        with Live(console=self.console, transient=True, auto_refresh=False) as live:
            for side, conversation in enumerate(self.conversations):

                def write(piece: str, side: int = side) -> None:
                    answers[side] += piece
                    live.update(_side_by_side(answers), refresh=self.console.is_terminal)

                conversation.reply(text, images, write)
        self.console.print(_side_by_side(answers))

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)


def _side_by_side(answers: list[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    for heading in ("base model", "with the adapter"):
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_row(*(Text(answer) for answer in answers))
    return table


def options_parser() -> CommandParser:
    """The parser of its options."""
    parser = CommandParser(
        prog="na-lora chat",
        description="Talk with a model, or with an adapter on its base model; /help lists what can be asked for.",
    )
    parser.add_argument("model", help="folder of a run, an adapter or a model, or a model's name on the hub")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--compare", action="store_true", help="answer without the adapter too, side by side")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token"
    )
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="drawn from this much probability")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--base", metavar="MODEL", help="base model in the place of the one that an adapter names")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: auto, the checkpoint's on a GPU and float32 elsewhere)",
    )
    parser.add_argument("--quantization", metavar="KIND", help="hold the base weights as nf4, fp4, int8, ...")
    parser.add_argument(
        "--no_double_quantization", dest="double_quantization", action="store_false", help="of their scales"
    )
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--trust_remote_code", action="store_true", help="let a model run code of its own")
    return parser


def main(arguments: list[str]) -> int:
    """Runs ``na-lora chat``.

    Args:
        arguments: What follows ``chat`` on the command line.

    Returns:
        0.

    Raises:
        ConfigurationError: The user has something to correct.
    """
    options = options_parser().parse_args(arguments)
    import torch
    from rich.console import Console

    from na_lora_lightning.cli.speaker import AnswerSettings, Speaker
    from na_lora_lightning.models.quantization import QuantizationOptions

    settings = AnswerSettings(options.max_new_tokens, options.temperature, options.top_p)
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"there is no device {options.device!r} here; use 'cpu' or 'cuda'.") from error
    quantization = QuantizationOptions(options.quantization, options.double_quantization)
    speaker = Speaker(options.model, options.base, options.dtype, device, options.trust_remote_code, quantization)
    if options.system is not None and not speaker.has_template:
        raise ConfigurationError(
            f"--system needs a chat template, which {options.model!r} lacks; leave it out, or give a chat model."
        )
    if options.compare:
        speaker.require_base()
    torch.manual_seed(options.seed)
    sides = (False, True) if options.compare else (True,)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    chat = Chat([Conversation(speaker, settings, options.system, adapted) for adapted in sides], console)
    if sys.stdin.isatty():
        with suppress(ImportError):
            # Lines can then be edited and called back.
            import readline  # noqa: F401
        console.print(speaker.title, style="bold", markup=False, highlight=False)
        way = "" if speaker.has_template else "It has no chat template, so your texts are continued. "
        console.print(f"{way}/help lists commands, Ctrl-D ends.", style="dim", highlight=False)
    while (line := _line()) is not None and chat.take(line):
        pass
    return 0


def _line() -> str | None:
    """The next line; None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt) as end:
        print()
        return None if isinstance(end, EOFError) else ""
