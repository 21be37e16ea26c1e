"""Pre-train the small language model that `folklora learn --demo` teaches.

Writes text about the demo's world, trains a tokenizer on it, then a decoder of some 3 million parameters, and saves
both with a record of the run. On one GPU this takes about three minutes:

    python examples/pretrain_demo_model.py --out src/folklora/demo/model

Needs torch, transformers, tokenizers and safetensors; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from folklora.demo.world import World, name_pieces, pretraining_text, texts

END, PAD = "<|endoftext|>", "<|pad|>"
CHUNK = 2_000
LOGS = 20


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--batch", type=int, default=256, help="sequences a step")
    parser.add_argument("--context", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--documents", type=int, default=250_000, help="documents to write, some 45 tokens each")
    parser.add_argument("--vocabulary", type=int, default=2_304)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--minutes", type=float, default=3.0, help="training ends by then, its schedule complete")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_chunk(job: tuple[int, int]) -> list[str]:
    """Write one chunk of documents: the seed makes it the same whichever process writes it."""
    seed, documents = job
    return list(pretraining_text(World(), seed, documents))


def write_documents(seed: int, documents: int) -> list[str]:
    """Write what the model will read, on all processors."""
    starts = range(0, documents, CHUNK)
    jobs = [(seed * 1_000_003 + start, min(CHUNK, documents - start)) for start in starts]
    with ProcessPoolExecutor() as pool:
        return [text for chunk in pool.map(write_chunk, jobs) for text in chunk]


def train_tokenizer(documents: list[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `size` tokens, <|endoftext|> being 0 and <|pad|> 1.

    It sees each name as two words, so that no name becomes a token: a name that the model has never read has the
    same kind of pieces as those it knows.
    """
    heads, tails = name_pieces()
    name = re.compile(rf"\b({'|'.join(heads)})({'|'.join(tails)})\b")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((name.sub(r"\1\n\2", document) for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Join the documents' tokens, <|endoftext|> before each, into one row of int64."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return torch.tensor([token for document in encoded for token in (end, *document.ids)])


def small_llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """Build the decoder: Llama's architecture, embeddings tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=2 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 32,
            max_position_embeddings=1_024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def batches(tokens: torch.Tensor, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Cut [batch, context] blocks from random places of the packed tokens, without end."""
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.arange(options.context)
    while True:
        starts = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=generator)
        yield tokens[(starts + offsets).to(tokens.device)]


def loss_of(model: LlamaForCausalLM, block: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token, in nats; bfloat16 products on a GPU."""
    with torch.autocast(block.device.type, torch.bfloat16, enabled=block.device.type == "cuda"):
        logits = model(input_ids=block, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), block[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, context: int) -> float:
    """Mean loss on text about people, towns and houses that the model never read about."""
    blocks = tokens[: len(tokens) // context * context].view(-1, context)
    return sum(loss_of(model, part).item() * len(part) for part in blocks.split(32)) / len(blocks)


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to 2 % of the peak; `done` is from 0 to 1."""
    if done < 0.03:
        return peak * (done + 1e-3) / 0.031
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.03) / 0.97)))


def optimizer_of(model: LlamaForCausalLM, options: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW, with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=options.device == "cuda")


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, unread: torch.Tensor, options: argparse.Namespace
) -> list[dict[str, float]]:
    """Train until the steps or the minutes are over, whichever comes first; return the log."""
    optimizer = optimizer_of(model, options)
    log: list[dict[str, float]] = []
    start, paused = time.perf_counter(), 0.0
    for step, block in enumerate(batches(tokens, options), 1):
        done = max(step / options.steps, (time.perf_counter() - start) / 60 / options.minutes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(min(done, 1.0), options.lr)
        loss = loss_of(model, block)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if done >= (len(log) / LOGS) or done >= 1:
            row = {"step": step, "loss": round(loss.item(), 4)}
            now = time.perf_counter()
            row["tokens_per_second"] = round(step * block.numel() / (now - start - paused))
            row["held_out_loss"] = round(held_out_loss(model, unread, options.context), 4)
            paused += time.perf_counter() - now
            log.append(row)
            print("  ".join(f"{key} {value:,}" for key, value in row.items()), flush=True)
        if done >= 1:
            return log
    return log


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict, out: Path) -> None:
    """Write model (float16), tokenizer and record beside `out`, then put them in its place."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(dtype=torch.float16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "generation_config.json").unlink(missing_ok=True)
    (temporary / "model.safetensors").chmod(0o644)
    (temporary / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)


def main() -> None:
    """Write, tokenise, train, save."""
    options = arguments()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    documents = write_documents(options.seed, options.documents)
    tokenizer = train_tokenizer(documents[:20_000], options.vocabulary)
    tokens = pack(tokenizer, documents).to(options.device)
    unread = pack(tokenizer, list(texts(World().exam, options.seed, 500))).to(options.device)
    print(f"{len(documents):,} documents, {len(tokens):,} tokens, {time.perf_counter() - start:.0f} s", flush=True)

    model = small_llama(options).to(options.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {options.device}", flush=True)
    log = train(model, tokens, unread, options)
    record = {name: getattr(options, name) for name in vars(options) if name != "out"}
    record |= {"parameters": parameters, "distinct_tokens": len(tokens), "log": log}
    record["tokens_read"] = log[-1]["step"] * options.batch * options.context
    save(model, tokenizer, record, options.out)
    print(f"saved in {options.out}, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
