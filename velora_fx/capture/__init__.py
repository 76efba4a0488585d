"""One call of a block becomes one FX graph under a key."""

from velora_fx.capture.arguments import (
    CONSTANTS,
    example_call,
    flatten,
    is_cache,
    named_tensors,
    parameter_names,
    tensors_inside,
    without_empty_caches,
)
from velora_fx.capture.attributes import INTERNAL_ATTRIBUTES, is_plain_object, own_forward
from velora_fx.capture.blocks import child_regions, find_blocks, find_regions, has_trainable_matrix
from velora_fx.capture.call_differences import differences
from velora_fx.capture.checkpoints import Checkpoint, ContextFn, in_checkpoint, inlined_checkpoints, noted_checkpoints
from velora_fx.capture.export import Captured, export_function, isolated, plain_graph_module, undisturbed
from velora_fx.capture.graphs import (
    Call,
    RegionGraph,
    describe_leaf,
    find_graph,
    has_replaced_forwards,
    key_of,
    make_graph,
    merge_graph,
    with_frozen,
)
from velora_fx.capture.left_out import LeftOut, PassedOn, UnequalError, note_calls
from velora_fx.capture.live_block import LiveBlock, Seen
from velora_fx.capture.refusals import CaptureError, autocast_depth, refusals
from velora_fx.capture.state import (
    attached_tensors,
    attached_to,
    call_with,
    carriers_of,
    leave_out,
    own_attributes,
    own_carriers,
    state_of,
)

__all__ = [
    "CONSTANTS",
    "INTERNAL_ATTRIBUTES",
    "Call",
    "CaptureError",
    "Captured",
    "Checkpoint",
    "ContextFn",
    "LeftOut",
    "LiveBlock",
    "PassedOn",
    "RegionGraph",
    "Seen",
    "UnequalError",
    "attached_tensors",
    "attached_to",
    "autocast_depth",
    "call_with",
    "carriers_of",
    "child_regions",
    "describe_leaf",
    "differences",
    "example_call",
    "export_function",
    "find_blocks",
    "find_graph",
    "find_regions",
    "flatten",
    "has_replaced_forwards",
    "has_trainable_matrix",
    "in_checkpoint",
    "inlined_checkpoints",
    "is_cache",
    "is_plain_object",
    "isolated",
    "key_of",
    "leave_out",
    "make_graph",
    "merge_graph",
    "named_tensors",
    "note_calls",
    "noted_checkpoints",
    "own_attributes",
    "own_carriers",
    "own_forward",
    "parameter_names",
    "plain_graph_module",
    "refusals",
    "state_of",
    "tensors_inside",
    "undisturbed",
    "with_frozen",
    "without_empty_caches",
]
