"""Why tests of PEFT's fail for a method of Folklora: what `peft_battery.py` looks up for each failure."""

from __future__ import annotations

import re

from folklora.check import CHECKS, EXCEPTIONS

_PLAIN = "plain_module"
_OVERFLOWS = "trains a loss without lower bound till it overflows"
_OWN_LAYERS = "takes PEFT's choice of layers; the method has its own"
# what a message says, which tests say it, and why: a check that `folklora.check` excepts the method from, or words
_EXPLANATIONS: list[tuple[str, str, str]] = [
    (r"^assert False", r"randlora .*test_disable_adapters", _OVERFLOWS),
    (r"^assert False", r"randlora .*test_safe_merge", "compares float32 to 1e-6, where outputs are around 30"),
    (r"^assert False", r"randlora .*test_adapter_dtype", "asks for float32; random bases have the base's type"),
    (r"^assert False", r"smora .*test_only_params", "takes what has no gradient for constant; its balance moves"),
    (
        r"^ValueError",
        r"test_default_target_modules_(list|str)",
        _OWN_LAYERS,
    ),
    (
        r"^Failed: DID NOT RAISE|== \['lin0'\]",
        r"^(atlas|lt-sft) .*test_default_target_modules_",
        _OWN_LAYERS,
    ),
    (
        r"^AssertionError: assert \['lin0'\] == 'lin0'",
        r"^rocket .*test_default_target_modules_str",
        _OWN_LAYERS,
    ),
    (r"cannot be merged into layer", "", "merge"),
    (r"adapts linear layers; '\w+' is a Conv", "", "convolution"),
    (r"adapts linear layers; '\w+' is a Embedding", "", "embedding"),
    (r"takes no dropout|has no input to drop", "", "dropout"),
    (
        r"(inside|room in) the attention|the attention '\w+' can have no adapter dropout|no layer with one weight",
        "",
        "attention",
    ),
    (r"in no block of layers", "", _PLAIN),
    (r"so it is no fixed matrix that could be summed|changes entries of the weight and has no", "", "weighted"),
    (
        r"^ValueError: exssnet keeps what earlier tasks compute, which (modules_to_save|train_bias) would change",
        r"^exssnet ",
        "an option that would change what earlier tasks compute (modules_to_save, train_bias) is refused",
    ),
    (
        r"^assert not True",
        r"^exssnet .*test_disable_adapters_with_merging",
        "asks that three small steps change the output; they leave a mask over 10 entries or fewer as it was",
    ),
    (
        r"^assert False",
        r"^(?!exssnet ).*(test_safe_merge|test_disable_adapters\w*)\[Conv2dGroups2",
        "compares sums over 12800 numbers of up to 57600 to six digits of float32; PEFT skips it for its own LoRA",
    ),
    (r"^assert False", r"^lora .*test_disable_adapters\[MHA", _OVERFLOWS),
    (r"^assert False", r"test_disable_adapters", "start_at_base"),
    (
        r"matches no weight|adapts linear layers with one \[out, in\]|no (sub)?layer of M(lp|LP)|no default target",
        "",
        "names a matrix by its parameter (target_parameters), in a layer of the test's own that keeps it as [in, out]",
    ),
    (r"no (source|task vector) \w+ layer", "", "names a matrix by its parameter too, which no source adapts"),
    (r"made for another base", r"test_loading_model", "loads an adapter onto a base with other random weights"),
    (
        r"values that are not finite",
        r"test_parameters_after_loading",
        _OVERFLOWS,
    ),
    (
        r"(above|more than the) [0-9]+|leaves nothing of layer",
        "",
        "a layer has one row or column, too few for the method",
    ),
    (r"Regex pattern did not match|^ValueError: adapter_names", r"_raises", "asks for an error in PEFT's own words"),
    (r"DID NOT RAISE", r"batches_training_mode_raises", "asks that mixed batches cannot be trained; here they can"),
    (
        r"'folklora_shared|== \\{",
        r"base_model_state_dict",
        "OPEN: what layers share is listed among the base's parameters",
    ),
    (
        r"assert not True",
        r"test_only_params_are_updated",
        "asks that three small steps move every value; some of PEFT's own take 200 times the rate",
    ),
    (
        r"assert (not True|False)",
        r"am-lora .*(test_disable_adapters\[MLP|test_mixed_adapter_batches_\w+layers)",
        "its inputs go up to 89, where a softmax over adapters gives the base all of the weight",
    ),
    (
        r"^AssertionError: assert Battery\(",
        r"test_from_pretrained_config",
        "a configuration with statistics is replaced by one without",
    ),
    (r"assert False == True", r"test_set_requires_grad", "takes every parameter of an adapter for a trained one"),
    (r"== \{", r"test_default_target_modules", "asks for target_modules as a set; here they are a sorted list"),
]


def explanation(method: str, test: str, message: str) -> str | None:
    """Why a test fails, from what it says; None where that is not known."""
    for pattern, tests, reason in _EXPLANATIONS:
        if re.search(pattern, message) and re.search(tests, f"{method} {test}"):
            if reason in CHECKS:
                found = EXCEPTIONS.get((method, reason))
                return None if found is None else f"exception '{reason}': {found}"
            return reason
    return None
