"""How the demo trains: settings that every continual method knows, and those that some need for themselves."""

from __future__ import annotations

import pytest

from folklora import methods
from folklora.demo import demo_options
from folklora.stream.options import build_method, split_options


@pytest.mark.parametrize("name", [method.name for method in methods("continual")])
def test_every_continual_method_knows_the_options_that_the_demo_gives_it(name):
    settings, own = split_options([name], demo_options([name]))
    build_method(name, own)
    assert settings.max_length == 96
    assert (settings.learning_rate == 3e-3) == (name not in ("progprompt", "l2p"))


def test_what_is_set_stands_over_the_demos_own():
    assert demo_options()["r"] == 8
    options = demo_options(["seq-lora"], {"adapter": "pissa", "r": 4, "epochs": 1.0})
    assert (options["r"], options["epochs"], options["adapter"]) == (4, 1.0, "pissa")
    assert split_options(["seq-lora"], options)[0].epochs == 1.0
    # an adapter that has no rank is given none
    assert "r" not in demo_options(["seq-lora"], {"adapter": "peft:ia3"})


def test_methods_that_need_different_settings_are_not_trained_in_one_run():
    with pytest.raises(
        ValueError, match="trains seq-lora, progprompt with different batch_size, epochs, learning_rate"
    ):
        demo_options(["seq-lora", "progprompt"])
    shared = {"batch_size": 8, "epochs": 2.0, "learning_rate": 0.03}
    options = demo_options(["seq-lora", "progprompt"], shared)
    assert options.items() >= {**shared, "r": 8, "place": "answer"}.items()
    split_options(["seq-lora", "progprompt"], options)
