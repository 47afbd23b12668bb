"""Memory of streamed alignment: two layers, a shard and a batch's activations, whatever the depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import streamed_memory

# bytes the allocator may hold beyond what is in use; nothing beside the layers of a real model
KEPT = 8_000_000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_does_not_depend_on_the_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    monkeypatch.setattr(streamed_memory, "SHAPE", shape | {"vocab_size": 4000})
    monkeypatch.setattr(streamed_memory, "SHARD", 25_000_000)
    limit, peaks = streamed_memory.memory_bound(), {}
    for layers in (3, 24):
        whole = streamed_memory.make_source(tmp_path / f"source{layers}", layers)
        peaks[layers] = streamed_memory.run_streamed(
            tmp_path / f"source{layers}", tmp_path / f"out{layers}"
        )["all"]
        assert peaks[layers] <= limit["all"] + KEPT, (layers, peaks, limit)
    assert whole > 3 * limit["all"]  # the claim says something
    assert peaks[24] - peaks[3] < limit["layer"], peaks
