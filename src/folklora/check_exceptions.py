"""What a method cannot do, as data: `check_method` expects these checks to fail, and says why."""

from __future__ import annotations

_REASONS: dict[str, dict[str, str]] = {
    "adapterfusion": {
        "attention": "it stands behind a layer's output, which torch's attention keeps inside",
        "convolution": "its source adapters stand behind linear layers",
        "dropout": "its source adapters stay as they were trained",
        "embedding": "its source adapters stand behind linear layers",
        "export": "each token has a mixture of its own, and a LoRA is the same for every input",
        "merge": "each token has a mixture of its own, so no weight equals it",
        "start_at_base": "its start is a mixture of the source adapters, as in the paper",
        "unmerge": "each token has a mixture of its own, so no weight equals it",
        "weighted": "each token has a mixture of its own, so it is no matrix to be summed",
    },
    "am-lora": {
        "attention": "its attention reads each layer's input, which torch's keeps inside",
        "convolution": "its attention over adapters is defined on what enters a linear layer",
        "embedding": "its attention reads values, and an embedding's input is numbers of tokens",
        "export": "its attention reads each layer's input, and a LoRA is the same for every input",
        "merge": "its attention reads each layer's input, so no single weight equals it",
        "unmerge": "its attention reads each layer's input, so no single weight equals it",
        "weighted": "its attention reads each layer's input, so its update is no matrix to be summed",
    },
    "atlas": {
        "attention": "its task vectors are changes of single weights by name, which a module of several hides",
        "dropout": "it scales changes of the weight itself, which have no input to drop",
        "export": "what whole checkpoints changed has full rank (where all task vectors are adapters, it exports)",
        "weighted": "what whole checkpoints changed has full rank (where all task vectors are adapters, it is summed)",
    },
    "codyra": {
        "attention": "its importances and their count lie beside the weights, where a module of several has no room",
    },
    "corda": {
        "attention": "it needs the covariance of each weight's input, which torch's attention keeps inside",
        "convolution": "its covariance is that of the inputs of linear layers",
        "dropout": "it trains components of the weight, and dropout would drop some of the base itself",
        "embedding": "its covariance is that of the inputs of linear layers",
    },
    "diffora": {
        "attention": "its modules compete by gates that they share, for which a module of several weights has no room",
        "base_values": "what its layers share lies at the model's root, where PEFT looks for no adapter's values",
    },
    "exssnet": {
        "attention": "it changes entries of each weight, for which a module of several has no room",
        "dropout": "it changes the weight itself, which has no input to drop",
        "export": "what it changes of a weight has full rank, and a LoRA would be as large; it merges",
        "start_at_base": "its start is the masked weight, as in the paper: most entries are left out",
        "weighted": "what it changes of a weight has full rank, and the sum is a LoRA",
    },
    "factorllm": {
        "attention": "it cuts feed-forward layers into experts, and has no form for other layers",
        "convolution": "it cuts feed-forward layers into experts, and has no form for other layers",
        "dropout": "its authors have none, and the router's input is the layer's own",
        "embedding": "it cuts feed-forward layers into experts, and has no form for other layers",
        "export": "its router reads each layer's input, and a LoRA is the same for every input",
        "merge": "its router chooses experts for each token; folklora.adapters.factorllm.to_dense joins them all",
        "plain_module": "it cuts feed-forward layers into experts, and has no form for other layers",
        "start_at_base": "with some of its experts it is another function, as in the paper; all of them are the base",
        "unmerge": "its router chooses experts for each token; folklora.adapters.factorllm.to_dense joins them all",
        "weighted": "its router reads each layer's input, so its update is no matrix to be summed",
    },
    "generative-adapter": {
        "attention": "its generator reads what enters a layer's block, and adapts linear layers in it",
        "convolution": "its generator makes updates of linear layers",
        "dropout": "its authors train without, and the host would drop what the generator's text wrote",
        "embedding": "its generator makes updates of linear layers",
        "export": "each text has a LoRA of its own; Written.install gives one that exports",
        "merge": "each text has a weight of its own; Written.install gives one that merges",
        "mixing": "its layers read what enters their block, so that none can be called alone",
        "plain_module": "its generator reads what enters the block of layers that a layer is in",
        "rows": "while it is trained the rows of a batch are one text, and share the adapter",
        "unmerge": "each text has a weight of its own; Written.install gives one that merges",
        "weighted": "each text has a LoRA of its own; Written.install gives one that can be summed",
    },
    "kasa": {
        "start_at_base": "it takes the noise out of the base at the start, as in the paper; truncate=0 leaves it",
    },
    "kind": {
        "attention": "its gates read the class of each row, and all rows meet the same weights in torch's attention",
        "export": "its gates read the class of each row, and a LoRA is the same for every row",
        "merge": "its gates read the class of each row, so no single weight equals it",
        "unmerge": "its gates read the class of each row, so no single weight equals it",
        "weighted": "its gates read the class of each row, so its update is no matrix to be summed",
    },
    "lora-sb": {
        "attention": "it needs the gradient of each weight, of which calibration sees only whole layers",
        "start_at_base": "its start is the first step of full training, as in the paper",
    },
    "lora-xs": {
        "start_at_base": "its core starts at small random values, as in the paper; sigma=0 starts at the base",
    },
    "lt-sft": {
        "attention": "it changes entries of each weight, for which a module of several has no room",
        "dropout": "it changes the weight itself, which has no input to drop",
        "export": "what it changes of a weight has full rank, and a LoRA would be as large; it merges",
        "weighted": "what it changes of a weight has full rank, and the sum is a LoRA",
    },
    "mixda": {
        "attention": "it stands beside a layer, whose input and output torch's attention keeps inside",
        "convolution": "its adapters read the hidden units of a feed-forward layer",
        "dropout": "its authors drop what the gate reads alone (gate_dropout)",
        "embedding": "its adapters read the hidden units of a feed-forward layer",
        "export": "what it adds is no linear function of the layer's input, as a LoRA would be",
        "merge": "what it adds is no linear function of the layer's input, so no weight equals it",
        "start_at_base": "its gate starts even between the layer and the adapters, as in the paper",
        "unmerge": "what it adds is no linear function of the layer's input, so no weight equals it",
        "weighted": "what it adds is no linear function of the layer's input, so it is no matrix to be summed",
    },
    "pissa": {
        "dropout": "it trains components of the weight, and dropout would drop some of the base itself",
    },
    "randlora": {
        "attention": "its layers share their random bases, and a module of several weights has no room for them",
        "base_values": "what its layers share lies at the model's root, where PEFT looks for no adapter's values",
    },
    "scalearn": {
        "attention": "it stands behind a layer's output, which torch's attention keeps inside",
        "convolution": "its source adapters stand behind linear layers",
        "dropout": "its source adapters stay as they were trained",
        "embedding": "its source adapters stand behind linear layers",
        "export": "bottlenecks are no linear function, as a LoRA would be (over LoRAs, it exports)",
        "merge": "bottlenecks are no linear function, so no weight equals them (over LoRAs, it merges)",
        "start_at_base": "its start is a mixture of the source adapters, as in the paper",
        "unmerge": "bottlenecks are no linear function, so no weight equals them (over LoRAs, it merges)",
        "weighted": "bottlenecks are no linear function, so no matrix to be summed (over LoRAs, it is one)",
    },
    "rocket": {
        "attention": "its sources are LoRAs of single weights by name, which a module of several hides",
        "convolution": "its router reads what enters a linear layer",
        "embedding": "its router reads values, and an embedding's input is numbers of tokens",
        "export": "its router reads each layer's input, and a LoRA is the same for every input",
        "merge": "its router reads each layer's input, so no single weight equals it",
        "start_at_base": "its start is the mixture of its sources, as in the paper",
        "unmerge": "its router reads each layer's input, so no single weight equals it",
        "weighted": "its router reads each layer's input, so its update is no matrix to be summed",
    },
    "smora": {
        "attention": "its router reads each layer's input, which torch's attention keeps inside",
        "convolution": "its router chooses ranks for each position of a linear layer's input",
        "embedding": "its router reads values, and an embedding's input is numbers of tokens",
        "export": "its router reads each layer's input, and a LoRA is the same for every input",
        "merge": "its router reads each layer's input, so no single weight equals it",
        "unmerge": "its router reads each layer's input, so no single weight equals it",
        "weighted": "its router reads each layer's input, so its update is no matrix to be summed",
    },
    "soma": {
        "dropout": "it trains components of the weight, and dropout would drop some of the base itself",
    },
    "vida": {
        "convolution": "its scales are those of the attention's linear layers, as in the paper",
        "embedding": "its scales are those of the attention's linear layers, as in the paper",
    },
    "vl-adapter": {
        "attention": "it stands behind a layer's output, which torch's attention keeps inside",
        "convolution": "its bottleneck stands behind a sublayer's last linear layer",
        "dropout": "its authors have none in the bottleneck",
        "embedding": "its bottleneck stands behind a sublayer's last linear layer",
        "export": "what it adds is no linear function of the layer's output, as a LoRA would be",
        "merge": "what it adds is no linear function of the layer's output, so no weight equals it",
        "unmerge": "what it adds is no linear function of the layer's output, so no weight equals it",
        "weighted": "what it adds is no linear function of the layer's output, so it is no matrix to be summed",
    },
}
EXCEPTIONS: dict[tuple[str, str], str] = {
    (method, check): reason for method, reasons in _REASONS.items() for check, reason in reasons.items()
}
"""(method, check) -> why the method cannot pass it; the check must then fail."""
