"""`regraft generate`: text from a model."""

from __future__ import annotations

from dataclasses import asdict

from ..progress import print_line
from .verb import Outcome, Verb


def generate_text(
    model: str,
    prompt: str,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    trust_remote_code: bool = False,
    json: bool = False,
) -> Outcome:
    """Continue a prompt, streaming the text; the state's size goes to standard error.

    Args:
        model: model directory, GGUF file, or name on the hub (ORG/MODEL, ORG/MODEL@REVISION)
        prompt: text to continue
        tokens: at most this many new tokens
        temperature: 0 is greedy
        seed: of the sampling
        chat: wrap the prompt in the model's chat template
        trust_remote_code: run the Python files beside the tokenizer, if it needs them
        json: print one JSON object on standard output and nothing else
    """
    from .. import modeling
    from ..modeling import generate as generating

    def print_piece(piece: str) -> None:
        print(piece, end="", flush=True)

    modeling.check_decoder(model)
    loaded = modeling.load(model)
    tokenizer = modeling.load_tokenizer(model, trust_remote_code)
    result = generating.generate(
        loaded, tokenizer, prompt, tokens, temperature, seed, chat, None if json else print_piece
    )
    if not json:
        print()
    print_line(result.format_state_size())
    return Outcome(asdict(result))


VERB = Verb(
    generate_text,
    examples=(
        'regraft generate MODEL "The capital of France is" --tokens 64',
        'regraft generate MODEL "Name three rivers." --chat --temperature 0.7',
    ),
)
