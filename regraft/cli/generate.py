"""`regraft generate`: text from a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..progress import print_line
from .verb import Outcome, Verb


def generate_text(
    model: str,
    prompt: str,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    verify: str | None = None,
    dtype: str = "float32",
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
        verify: the source: it checks blocks that the model drafts, and the text is exactly its own
        dtype: of the model's weights (float32, bfloat16, float16, int8); a source that verifies
            keeps float32
        trust_remote_code: run the Python files beside the tokenizer, if it needs them
        json: print one JSON object on standard output and nothing else
    """
    from .. import modeling
    from ..modeling import generate as generating

    def print_piece(piece: str) -> None:
        print(piece, end="", flush=True)

    weights = modeling.parse_decoding_dtype(dtype)
    modeling.check_decoder(model, verify)
    loaded = modeling.load(model, weights)
    tokenizer = modeling.load_tokenizer(model, trust_remote_code)
    source = load_source(verify, model, loaded, tokenizer, prompt, trust_remote_code)
    sink = None if json else print_piece
    result = generating.generate(
        loaded, tokenizer, prompt, tokens, temperature, seed, chat, sink, source
    )
    if not json:
        print()
    print_line(result.format_state_size())
    if source is not None:
        print_line(result.format_blocks())
    return Outcome(asdict(result))


def load_source(
    path: str | None, model: str, loaded: Any, tokenizer: Any, prompt: str, trust_remote_code: bool
) -> Any:
    """The model that verifies, whose weights the draft takes where they are the same; says so.

    Args:
        path: of the source; None: there is none.
        model: path of the draft.
        loaded: the draft.
        tokenizer: its own.
        prompt: what both tokenizers shall split alike.
        trust_remote_code: as of the verb.
    """
    from .. import modeling
    from ..io.hub import display_name
    from ..modeling.speculative import check_draft, share_weights

    if path is None:
        return None
    source = modeling.load(path)
    names = display_name(model), display_name(path)
    own = modeling.load_tokenizer(path, trust_remote_code)
    check_draft(names, (loaded, source), (tokenizer, own), prompt)

    shared, total = (size / 2**20 for size in share_weights(loaded, source))
    line = f"held once: {shared:.1f} of {total:.1f} MiB of weights, which '{names[1]}' has too"
    if not shared:
        line = f"'{names[1]}' has no weights of '{names[0]}': the text is its own all the same"
    print_line(line)
    return source


VERB = Verb(
    generate_text,
    examples=(
        'regraft generate MODEL "The capital of France is" --tokens 64',
        'regraft generate MODEL "Name three rivers." --chat --verify SOURCE',
    ),
)
