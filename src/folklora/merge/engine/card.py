"""What stands beside the merged weights: configuration, tokenizer, and a card that says what was merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from folklora.merge.engine.config import MergeConfig, Reference
from folklora.merge.engine.models import CONFIG, Model
from folklora.merge.engine.plan import Plan
from folklora.merge.engine.schema import Schema
from folklora.merge.engine.vocabulary import Vocabulary
from folklora.stream.files import read_json, write_json, write_text

GENERATION = "generation_config.json"
# what the configurations of different models call the number of layers
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
# said on the card of a method that serves one task at a time
_TASKS = (
    "The weights in this folder are those common to all tasks, with what each task adds beside them in `tasks/`. "
    "`folklora merge FOLDER --task NUMBER --out OUT` writes the model of one task."
)


def layers_key(config: Mapping[str, Any]) -> str:
    """What a model's configuration calls its number of layers.

    Raises:
        ValueError: It has none of the known names.
    """
    for key in _LAYERS:
        if key in config:
            return key
    raise ValueError(f"slices change the number of layers, and the configuration has none of {', '.join(_LAYERS)}")


def write_beside(
    folder: Path,
    config: MergeConfig,
    schema: Schema,
    plan: Plan,
    models: Mapping[Reference, Model],
    vocabulary: Vocabulary | None,
) -> None:
    """Write all but the weights.

    Args:
        folder: Where.
        config: What was asked for.
        schema: The method.
        plan: What was done.
        models: The inputs.
        vocabulary: The merged one, where it is not the models' own.
    """
    donor = models[plan.donor]
    merged = merged_config(config, plan, models)
    generation = donor.folder / GENERATION
    if vocabulary is not None:
        merged = vocabulary.translate(merged)
        vocabulary.tokenizer.save_pretrained(folder)
    else:
        _copy_tokenizer(donor.folder, folder, config.chat_template)
    write_json(folder / CONFIG, merged)
    if generation.is_file():
        own = read_json(generation)
        write_json(folder / GENERATION, own if vocabulary is None else vocabulary.translate(own))
    write_text(folder / "README.md", card(config, schema, models))


def merged_config(config: MergeConfig, plan: Plan, models: Mapping[Reference, Model]) -> dict[str, Any]:
    """The merged model's configuration: the base's, with its own type and number of layers."""
    found = dict(models[plan.donor].config)
    if config.dtype is not None:
        found["torch_dtype" if "torch_dtype" in found else "dtype"] = config.dtype
    if plan.layers is None:
        return found
    key = layers_key(found)
    if isinstance(found.get("layer_types"), list):
        chosen = [part.sources[0] for part in config.slices]
        found["layer_types"] = [
            kind for source in chosen for kind in models[source.model].config["layer_types"][slice(*source.layers)]
        ]
    return {**found, key: plan.layers}


def card(config: MergeConfig, schema: Schema, models: Mapping[Reference, Model]) -> str:
    """The model card: what was merged, and the YAML that does it again."""
    bases = dict.fromkeys(model.path for model in models)
    head = {"base_model": list(bases), "library_name": "transformers", "tags": ["merge", "folklora"]}
    rows = [f"- {model}" + (" (the base)" if model == config.base else "") for model in models]
    doc = (schema.function.__doc__ or schema.name).strip().splitlines()[0]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "# A merged model",
            "",
            f"Merged with Folklora. The method is `{schema.name}`. {doc}",
            f"Its source: {schema.function.paper}.",
            "",
            "The models:",
            "",
            *rows,
            "",
            *([_TASKS, ""] if schema.per_task else []),
            "`folklora merge config.yaml --out FOLDER` makes it again from this configuration:",
            "",
            "```yaml",
            config.text.strip(),
            "```",
            "",
        ]
    )


def _copy_tokenizer(source: Path, folder: Path, template: str | None) -> None:
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if template is not None:
        write_text(folder / "chat_template.jinja", template)
        settings = folder / "tokenizer_config.json"
        if settings.is_file() and "chat_template" in (read := json.loads(settings.read_text(encoding="utf-8"))):
            del read["chat_template"]
            write_json(settings, read)
