"""The engine under the merging methods: reads sharded safetensors lazily and writes the merged model as it goes."""

from folklora.merge.engine.config import MergeConfig, read_config
from folklora.merge.engine.job import prepare
from folklora.merge.engine.run import merge_models
from folklora.merge.engine.tasks import task_tensors, write_task

__all__ = ["MergeConfig", "merge_models", "prepare", "read_config", "task_tensors", "write_task"]
