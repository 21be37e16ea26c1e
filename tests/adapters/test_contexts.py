"""Texts written into a Generative Adapter: states that add up, are applied, saved and installed as plain LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from folklora import GenerativeAdapter, Written, applied, export_lora, tiny, write
from folklora.adapters.contexts import instruction_batch, pretraining_batch, windows
from folklora.adapters.host.call import telling
from folklora.adapters.host.layer import layers_of, updates_of

EPS32 = torch.finfo(torch.float32).eps


def model(start: bool = False, **options: Any) -> PeftModel:
    config = GenerativeAdapter(
        **{"r": 8, "max_rank": 4, "window": 6, "segments": 4, "target_modules": ["o_proj", "v_proj"]} | options
    )
    net = tiny.adapted(config)
    return (net if start else tiny.moved(net)).eval()


def text(length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(tiny.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(net: PeftModel, rows: int = 2) -> Tensor:
    return net(text(5 * rows, seed=9).view(rows, 5)).logits


def close(actual: Tensor, expected: Tensor) -> None:
    # two layers of sums of at most 48 terms in float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * EPS32 * float(expected.abs().max()))


def test_streaming_equals_reading_all_windows_as_segments_of_one_batch():
    net = model(segments=3)
    tokens = text(18)
    record: dict[tuple[str, str], Tensor] = {}
    with telling(net, record=record), torch.no_grad():
        net(tokens.view(3, 6))
    written = write(net, tokens)
    assert written.tokens == 18
    for layer, _ in updates_of(net, "default"):
        close(written.states[layer.name], record["default", layer.name].sum(0))
    again = write(net, tokens[12:], onto=write(net, tokens[:12]))
    for name, S in written.states.items():
        close(again.states[name], S)


def test_in_parallel_each_window_is_read_with_the_base_alone():
    net = model()
    together = write(net, text(12), strategy="parallel")
    apart = write(net, text(12)[:6]) + write(net, text(12)[6:])
    sequential = write(net, text(12))
    assert together.tokens == apart.tokens == 12
    for name, S in together.states.items():
        close(apart.states[name], S)
    # the first block's input is the same either way; the second's is not
    first, *_, last = sorted(together.states)
    close(sequential.states[first], together.states[first])
    assert not torch.allclose(sequential.states[last], together.states[last], rtol=1e-3)


def test_windows_are_as_equal_as_can_be():
    assert [len(piece) for piece in windows(text(13), 6)] == [5, 5, 3]
    assert [len(piece) for piece in windows(text(6), 6)] == [6]


def test_a_string_goes_through_its_tokenizer(tiny_tokenizer: Any, tiny_llama: Any):
    from peft import get_peft_model

    net = tiny.moved(get_peft_model(tiny_llama(), GenerativeAdapter(r=8)))
    by_name = write(net, "a good film", tokenizer=tiny_tokenizer)
    by_number = write(net, tiny_tokenizer("a good film")["input_ids"])
    for name, S in by_name.states.items():
        assert torch.equal(by_number.states[name], S)


def test_what_is_applied_is_gone_afterwards_even_after_an_error():
    net, base = model(segments=1), logits(tiny.llama())
    written = write(net, text())
    with applied(net, written):
        during = logits(net)
    assert not torch.allclose(during, base)
    with pytest.raises(RuntimeError, match="stop"), applied(net, written):
        raise RuntimeError("stop")
    assert torch.equal(logits(net), base)
    assert next(layers_of(net)).context.told == {}
    with applied(net, written):
        with applied(net, None):
            assert torch.equal(logits(net), base)
        assert torch.equal(logits(net), during)


def test_disabled_it_is_the_base_bit_for_bit_whatever_is_applied():
    net = model(segments=1)
    with applied(net, write(net, text())), net.disable_adapter():
        assert torch.equal(logits(net), logits(tiny.llama()))


def test_rows_may_have_an_adapter_each():
    net = model()
    one, two = write(net, text()), write(net, text(seed=1))
    separate = []
    for state in (one, None, two, one):
        with applied(net, state):
            separate.append(logits(net, 4))
    with applied(net, [one, None, two, one]):
        mixed = logits(net, 4)
    close(mixed, torch.stack([rows[i] for i, rows in enumerate(separate)]))
    with (
        applied(net, [one, two, None]),
        pytest.raises(ValueError, match="3 adapters were applied, one a row"),
    ):
        logits(net, 4)


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_with_a_cache_equals_reading_all_again(beams: int):
    net = model()
    states = [write(net, text()), write(net, text(seed=1))]
    call = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with applied(net, states):
        cached = net.generate(text(8).view(2, 4), use_cache=True, **call)
        fresh = net.generate(text(8).view(2, 4), use_cache=False, **call)
    assert torch.equal(cached, fresh)


def test_installed_as_a_lora_it_computes_the_same_merges_saves_and_exports(tmp_path: Path):
    net = model()
    written = write(net, text())
    with applied(net, written):
        expected = logits(net)
    written.install(net, "notes")
    assert net.active_adapters == ["default"]
    net.set_adapter("notes")
    close(logits(net), expected)
    for layer, update in updates_of(net, "notes"):
        assert update.A.shape[0] == 4, layer.name
    net.merge_adapter(["notes"])
    close(logits(net), expected)
    net.unmerge_adapter()
    ranks = export_lora(net, tmp_path / "lora", "notes")
    assert set(ranks.values()) == {4}
    close(logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")), expected)
    net.save_pretrained(tmp_path / "saved", selected_adapters=["notes"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved" / "notes")), logits(net))
    mixed = net(text(10, seed=9).view(2, 5), adapter_names=["notes", "__base__"]).logits
    close(mixed.detach(), torch.stack([expected[0], logits(tiny.llama())[1]]))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_without_truncation_the_lora_has_the_rank_of_the_generator(norm: str):
    net = model(norm=norm, inter_size=5)
    written = write(net, text())
    with applied(net, written):
        expected = logits(net)
    written.install(net, "notes")
    assert {update.A.shape[0] for _, update in updates_of(net, "notes")} == {5}
    net.set_adapter("notes")
    close(logits(net), expected)


def test_ranks_above_a_layer_are_cut_to_what_it_can_hold():
    net = model(r=40, max_rank=30)
    written = write(net, text())
    with applied(net, written):
        expected = logits(net)
    written.install(net, "notes")
    # v_proj is [16, 32], o_proj [32, 32]
    assert {update.A.shape[0] for _, update in updates_of(net, "notes")} == {16, 30}
    net.set_adapter("notes")
    close(logits(net), expected)


def test_saved_and_loaded_with_its_generator_it_computes_the_same(tmp_path: Path):
    net = model()
    written = write(net, text())
    written.save(tmp_path / "notes.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.safetensors"]
    net.save_pretrained(tmp_path / "generator")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "generator", adapter_name="other").eval()
    again = Written.load(tmp_path / "notes.safetensors")
    assert again.tokens == 12
    with applied(net, written), applied(loaded, again, "other"):
        assert torch.equal(logits(loaded), logits(net))


def test_another_generators_state_is_refused(tmp_path: Path):
    net, other = model(), model(start=True)
    written = write(net, text())
    for refused in (
        lambda: applied(other, written).__enter__(),
        lambda: written.install(other, "notes"),
        lambda: write(other, text(), onto=written),
    ):
        with pytest.raises(ValueError, match=r"by another generator on layer 'model\.layers\.0"):
            refused()
    with pytest.raises(ValueError, match="different generators"):
        written + write(other, text())
    with pytest.raises(ValueError, match=r"other layers: model\.layers"):
        applied(model(target_modules=["o_proj"]), written).__enter__()
    tiny.train(net)
    with pytest.raises(ValueError, match="write the text again"), applied(net, written):
        pass
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no state of a Generative Adapter"):
        Written.load(tmp_path / "adapter_model.safetensors")


def test_what_cannot_be_written_is_refused():
    net = model()
    with pytest.raises(ValueError, match="needs its tokenizer"):
        write(net, "a text")
    for nothing in ([], [[1, 2]], [0.5]):
        with pytest.raises(ValueError, match="tokens must be whole numbers"):
            write(net, nothing)
    with pytest.raises(ValueError, match="no GenerativeAdapter named 'other'"):
        write(net, text(), adapter_name="other")
    with pytest.raises(ValueError, match="strategy must be sequential or parallel"):
        write(net, text(), strategy="concat")
    write(net, text()).install(net, "notes")
    with pytest.raises(ValueError, match="an adapter 'notes' already"):
        write(net, text()).install(net, "notes")
    net.set_adapter("notes")
    with pytest.raises(ValueError, match="adapter 'default' is not active"):
        write(net, text())


def test_writing_leaves_the_mode_and_the_parameters_alone():
    net = model().train()
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    written = write(net, text())
    assert net.training
    assert not any(S.requires_grad for S in written.states.values())
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name])


def test_over_a_bfloat16_base_states_are_float32():
    net = tiny.moved(tiny.adapted(GenerativeAdapter(r=8, target_modules=["o_proj"]), dtype=torch.bfloat16)).eval()
    written = write(net, text())
    assert all(S.dtype == torch.float32 for S in written.states.values())
    with applied(net, written):
        assert torch.isfinite(logits(net)).all()
        assert logits(net).dtype == torch.bfloat16


def test_the_rows_of_a_pretraining_batch():
    documents = torch.arange(2 * 24).view(2, 24)
    batch = pretraining_batch(documents, 6, pad=99, generator=torch.Generator().manual_seed(0))
    assert {name: list(value.shape) for name, value in batch.items()} == {
        name: [16, 6] for name in ("input_ids", "attention_mask", "labels")
    }
    starts = []
    for document, rows in zip(documents, batch["input_ids"].view(2, 8, 6), strict=True):
        assert torch.equal(rows[:4], document.view(4, 6))
        for j, row in enumerate(rows[4:]):
            piece = row[row != 99]
            first = int(piece[0] - document[0])
            starts.append(first)
            assert torch.equal(piece, document[first : first + len(piece)])
            assert len(piece) == min(6, 6 * (j + 1) - first)
    assert len(set(starts)) > 3
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert torch.equal(batch["input_ids"] == 99, batch["attention_mask"] == 0)
    with pytest.raises(ValueError, match="24 tokens are no whole number of windows of 7"):
        pretraining_batch(documents, 7, pad=99)


def test_the_rows_of_an_instruction_batch():
    contexts, conversations = [text(7), text(3)], [text(4, seed=1), text(2, seed=2)]
    labels = [row.clone() for row in conversations]
    labels[0][:2] = -100
    batch = instruction_batch(contexts, conversations, labels, segments=3, pad=60)
    rows, wanted, mask = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    assert rows.shape == (6, 4)
    assert mask.sum(1).tolist() == [4, 3, 4, 2, 1, 2]
    assert torch.equal(torch.cat([rows[0], rows[1][:3]]), contexts[0])
    assert torch.equal(rows[2], conversations[0])
    assert (wanted[[0, 1, 3, 4]] == -100).all()
    assert torch.equal(wanted[2], labels[0])
    with pytest.raises(ValueError, match="pair 0: a context of 1 tokens"):
        instruction_batch([text(1)], conversations[:1], labels[:1], segments=3, pad=60)


def test_training_on_the_batches_learns_to_carry_a_text_over():
    """A piece whose text was only written is predicted better after a few steps than without what was written."""
    torch.manual_seed(0)
    config = GenerativeAdapter(r=16, max_rank=8, segments=4, layout="reconstruction", target_modules=["o_proj"])
    net = tiny.adapted(config)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(60):
        # each document repeats one token of its own, which only the document tells
        documents = torch.randint(tiny.VOCABULARY, (8, 1), generator=generator).expand(8, 12)
        loss = net(**pretraining_batch(documents, 6, pad=0, generator=generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    told, untold = [], []
    for token in range(0, tiny.VOCABULARY, 6):
        document = torch.full((12,), token)
        for kept, state in ((told, write(net, document)), (untold, None)):
            with applied(net, state), torch.no_grad():
                kept.append(float(net(document[None, :6], labels=document[None, :6]).loss))
    assert sum(told) < 0.8 * sum(untold)
