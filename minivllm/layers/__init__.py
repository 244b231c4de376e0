"""Building blocks of models.  Device-neutral: what depends on the device goes through a `Backend`.

A layer that holds weights has `targets(name)`: the checkpoint tensors it takes, each with the view it is written to,
where `name` is the layer's own path in the checkpoint, such as "model.layers.0.mlp.down_proj".
"""

from minivllm.layers.attention import Attention
from minivllm.layers.embedding import Embedding, LMHead
from minivllm.layers.linear import Linear, MergedLinear, Target
from minivllm.layers.norm import RMSNorm
from minivllm.layers.rotary import rope_table

__all__ = ["Attention", "Embedding", "LMHead", "Linear", "MergedLinear", "RMSNorm", "Target", "rope_table"]
