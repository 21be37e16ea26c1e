"""Every adapter method that is installed passes every check of `folklora.check`, or is excepted from it in words."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from folklora import (
    ATLAS,
    KIND,
    LTSFT,
    OSFT,
    SALT,
    SORSA,
    AdapterFusion,
    AMLoRA,
    CoDyRA,
    CorDA,
    DiffoRA,
    ExSSNeT,
    FactorLLM,
    GenerativeAdapter,
    KaSA,
    LoRA,
    LoRASB,
    LoRAXS,
    MixDA,
    PiSSA,
    RandLoRA,
    Rocket,
    ScaLearn,
    SMoRA,
    SVFit,
    ViDA,
    VLAdapter,
    check,
    methods,
    tiny,
)
from folklora.adapters.lora import LoRAUpdate

TARGETS = tiny.TARGETS
METHODS = {method.name: method.factory for method in methods("adapters")}


# options that change what a method computes or holds; every method's defaults are checked without being listed
VARIANTS = {
    "adapterfusion without values": AdapterFusion(fusion="static", start_temperature=50, target_modules=TARGETS),
    "am-lora of three tasks": AMLoRA(r=3, tasks=3, granularity="sequence", sparsity=0.1, target_modules=TARGETS),
    "am-lora of all gates": AMLoRA(
        r=3,
        tasks=2,
        gate_input="both",
        score_activation="tanh",
        selector_train="all",
        zero_slot=False,
        sparsity=0.1,
        sparsity_on="entropy",
        target_modules=TARGETS,
    ),
    "am-lora as in the paper": AMLoRA(r=3, tasks=2, gate_input="lora", sparsity_on="scores", target_modules=TARGETS),
    "atlas in parts": ATLAS(parts=3, init=0.3, norm=2, target_modules=["embed_tokens", "o_proj"]),
    "codyra with thresholds": CoDyRA(r=4, steps=4, dense=0.0, kappa_max=0.2, dropout=0.3, target_modules=TARGETS),
    "corda kpm": CorDA(r=3, mode="kpm", alpha=7, power=0.5, target_modules="all-linear", rank_pattern={"k_proj": 5}),
    "diffora with competing gates": DiffoRA(r=3, gate="softmax-row", dropout=0.3, rank_pattern={"v_proj": 5}),
    "diffora of chosen modules": DiffoRA(
        r=3,
        shared_r=2,
        target_modules=TARGETS,
        selected=["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"],
    ),
    "exssnet on embedding and head": ExSSNeT(density=0.5, target_modules=["embed_tokens", "lm_head", "o_proj"]),
    "factorllm with trained experts": FactorLLM(
        experts=6, top_k=2, partition="kmeans", labels="subset", prior="uniform", scale=1.0, train_experts=True
    ),
    "generative-adapter by reconstruction": GenerativeAdapter(
        r=5,
        inter_size=7,
        max_rank=2,
        segments=4,
        layout="reconstruction",
        target_modules="all-linear",
        rank_pattern={"o_proj": 3},
    ),
    "generative-adapter of another norm": GenerativeAdapter(
        r=5, norm="frobenius", segments=2, target_modules=["o_proj"]
    ),
    "kasa without truncation": KaSA(r=3, truncate=0, target_modules=TARGETS),
    "kasa with dropout": KaSA(
        r=3,
        truncate=5,
        truncate_limit=1.0,
        l3="paper",
        reduction="sum",
        rslora=True,
        dropout=0.3,
        target_modules="all-linear",
    ),
    "kind with attached classes": KIND(
        tailors=1, classes=[1, 0, 7], attached=2, dropout=0.3, target_modules=["embed_tokens", *TARGETS]
    ),
    "kind over the weight": KIND(
        learngenes=3, tailors=2, classes=3, start="weight", orthogonality=0.01, target_modules="all-linear"
    ),
    "lora on embedding and head": LoRA(
        r=3, dropout=0.3, target_modules=["embed_tokens", "lm_head", "o_proj"], rank_pattern={"o_proj": 5}
    ),
    "lora-sb on embedding and head": LoRASB(
        r=3,
        alpha=7,
        eta=0.01,
        dropout=0.3,
        target_modules=["embed_tokens", "lm_head", "o_proj"],
        rank_pattern={"o_proj": 5},
    ),
    "lora-xs from the base": LoRAXS(
        r=3, sigma=0.0, alpha=7, dropout=0.3, target_modules=["embed_tokens", "lm_head", "o_proj", "up_proj"]
    ),
    "lt-sft with an l1 term": LTSFT(l1_full=5.0, train_bias=True, target_modules=["embed_tokens", "lm_head", "o_proj"]),
    "mixda of each token": MixDA(gate="sigmoid", gate_reads="token", gate_hidden=9, gate_layers=1, reduction=4),
    "osft by a share": OSFT(
        unfreeze_rank_ratio=0.6, dropout=0.3, target_modules=["embed_tokens", "lm_head", "k_proj", "o_proj", "up_proj"]
    ),
    "osft of full rank": OSFT(r=16, rank_pattern={"q_proj": 32}, target_modules=["q_proj", "v_proj"]),
    "pissa with alpha": PiSSA(r=3, alpha=7, rslora=True, target_modules="all-linear", rank_pattern={"k_proj": 5}),
    "randlora with other bases": RandLoRA(
        r=3, scale_rule="alpha/(r sqrt n)", bases="sparse", peft_layout=True, dropout=0.3, rank_pattern={"v_proj": 5}
    ),
    "rocket of all experts": Rocket(top_k=3, dropout=0.3, target_modules=TARGETS),
    "salt without relu": SALT(r=3, top=4, relu="none", penalty_weight=0.1, save_vectors=True, target_modules=TARGETS),
    "salt with a positive diagonal": SALT(r=3, top_ratio=0.5, relu="diag", target_modules="all-linear"),
    "scalearn with a regulariser": ScaLearn(regularization=0.1, coefficient_dropout=0.0, target_modules="all-linear"),
    "scalearn++": ScaLearn(share_layers=True, target_modules=["o_proj", "down_proj"]),
    "scalearn uniform": ScaLearn(uniform=True, init=0.3, target_modules=TARGETS),
    "scalearn uniform++": ScaLearn(uniform=True, share_layers=True, target_modules=TARGETS),
    "smora in blocks": SMoRA(
        r=12,
        k=4,
        p=2,
        balance_rate=0.1,
        bias_in_gate=False,
        dropout=0.3,
        rank_pattern={"v_proj": 6},
        target_modules=TARGETS,
    ),
    "sorsa with dropout": SORSA(
        r=3, alpha=7, dropout=0.3, peak_learning_rate=0.03, reduction="sum", target_modules="all-linear"
    ),
    "svfit by energy": SVFit(energy=0.9, energy_of="s", target_modules=["embed_tokens", "lm_head", *TARGETS]),
    "vida from another start": ViDA(
        r=5, low_rank=2, start="kaiming", dropout=0.3, target_modules="all-linear", rank_pattern={"k_proj": 3}
    ),
    "vl-adapter as compacter": VLAdapter(form="compacter", factor_rank=1, z_penalty=0.1, target_modules="all-linear"),
    "vl-adapter as hyperformer": VLAdapter(
        form="hyperformer", embedding_size=9, hyper_hidden=7, projected_size=4, target_modules=["o_proj", "down_proj"]
    ),
    "vl-adapter with tasks of one": VLAdapter(
        tasks=["vqa", "caption"], reduction_factor=4, target_modules=["o_proj", "down_proj"]
    ),
}


@pytest.mark.parametrize("name", check.CHECKS)
@pytest.mark.parametrize("method", METHODS)
def test_method_passes(method: str, name: str) -> None:
    _expect(check.run_check(METHODS[method], name))


# those of check_layers take the class alone, and have seen it
@pytest.mark.parametrize(
    "name",
    [name for name, own in check.CHECKS.items() if name != "compile" and own.__module__ != "folklora.check_layers"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes(variant: str, name: str) -> None:
    _expect(check.run_check(VARIANTS[variant], name))


def _expect(result: check.Result) -> None:
    if result.outcome == "skipped":
        pytest.skip(result.message)
    if result.outcome == "excepted":
        pytest.xfail(result.message)
    assert result.outcome == "passed", result.message


def test_every_exception_names_a_method_and_a_check() -> None:
    unknown = [key for key in check.EXCEPTIONS if key[0] not in METHODS or key[1] not in check.CHECKS]
    assert unknown == []
    assert all(sentence.strip() for sentence in check.EXCEPTIONS.values())


@dataclass
class Careless(LoRA):
    method: str = "careless"

    def update(self, weight: torch.Tensor) -> CarelessUpdate:
        plain = super().update(weight)
        return CarelessUpdate(plain.A, plain.B, plain.scale)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        return self.r


class CarelessUpdate(LoRAUpdate):
    def factors(self, x: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> object:
        return super().factors().scale(float(torch.rand(())))


def test_a_wrong_method_is_told_everything_that_is_wrong_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # compiling takes seconds, and the method is wrong in enough other ways
    monkeypatch.delitem(check.CHECKS, "compile")
    with pytest.raises(check.ConformanceError) as caught:
        check.check_method(Careless)
    message = str(caught.value)
    assert message.startswith("careless fails ")
    assert "trainable_count says 24" in message.partition("trainable_count: ")[2]
    assert "determinism: the logits of a second pass: not equal bit for bit" in message
    assert "save: ValueError: there is no method 'careless'" in message
    assert "frozen:" not in message


def test_options_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(check, "CHECKS", {"seen": seen.append})
    check.check_method(LoRA, alpha=3.0)
    check.check_method(LoRA(r=2, target_modules="all-linear"), alpha=5.0)
    assert [(config.r, config.alpha, config.target_modules) for config in seen] == [
        (4, 3.0, tiny.TARGETS),
        (2, 5.0, "all-linear"),
    ]


def test_an_exception_that_is_out_of_date_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.EXCEPTIONS, ("lora", "disable"), "it cannot")
    result = check.run_check(LoRA, "disable")
    assert result.outcome == "failed"
    assert "out of date" in result.message


def test_what_cannot_run_here_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_nothing(config: LoRA) -> None:
        raise check.NotHereError("no such device")

    monkeypatch.setitem(check.CHECKS, "nothing", check_nothing)
    assert check.run_check(LoRA, "nothing") == check.Result("lora", "nothing", "skipped", "no such device")


def test_no_decomposition_is_noticed_however_it_is_called() -> None:
    matrix = torch.randn(4, 4)
    for decompose in (torch.linalg.svd, torch.linalg.eigh, torch.linalg.qr, torch.svd_lowrank, torch.linalg.inv):
        with tiny.NoDecomposition(), pytest.raises(AssertionError, match="decomposition"):
            decompose(matrix)
    with tiny.NoDecomposition():
        assert torch.linalg.norm(matrix) > 0
