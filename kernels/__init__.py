"""Attention operators shared by the backbones: one file a pattern, public functions only here.

    from visionattn.kernels import routing_attention, set_backend, record_attention

`_dispatch` tells what to write in a pattern's file; its public functions are imported here, by name, which is what
editors and type checkers read.

Under the transforms of torch.func (vmap, grad, jvp, jacrev ...) "auto" takes the reference form, which takes more
memory and can be transformed in all ways; under a single grad backend="torch" works as well.
"""

from visionattn.kernels._dispatch import bodies, describe_backends, set_backend
from visionattn.kernels._proof import path as verdict_file
from visionattn.kernels._proof import verdicts
from visionattn.kernels._record import record_attention
from visionattn.kernels.agent import agent_attention
from visionattn.kernels.channel import channel_attention, cross_covariance_attention, linear_attention
from visionattn.kernels.decayed import decayed_attention
from visionattn.kernels.gated import gated_positional_attention
from visionattn.kernels.halo import halo_attention
from visionattn.kernels.neighborhood import neighborhood_attention
from visionattn.kernels.outlook import outlook_attention
from visionattn.kernels.routing import routing_attention
from visionattn.kernels.window import window_attention

__all__ = [
    "agent_attention",
    "bodies",
    "channel_attention",
    "cross_covariance_attention",
    "decayed_attention",
    "describe_backends",
    "gated_positional_attention",
    "halo_attention",
    "linear_attention",
    "neighborhood_attention",
    "outlook_attention",
    "record_attention",
    "routing_attention",
    "set_backend",
    "verdict_file",
    "verdicts",
    "window_attention",
]
