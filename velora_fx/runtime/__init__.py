"""What stays on a model and runs in training."""

from velora_fx.runtime.batch_watch import BatchWatch, ModelHook, unwatch, watch_batches
from velora_fx.runtime.calibrate import calibrate
from velora_fx.runtime.carriers import put_back, remove_carriers
from velora_fx.runtime.checkpointed import CONTEXTS, COSTLY, LEVELS, Checkpointed, Recompute, install_checkpointing
from velora_fx.runtime.factored_region import FactoredRegion
from velora_fx.runtime.factored_step import Folding
from velora_fx.runtime.inner_hooks import hooks_in
from velora_fx.runtime.install import RegionPlan, install
from velora_fx.runtime.measure import measured_step
from velora_fx.runtime.notices import Notices
from velora_fx.runtime.optimizers import OptimizerFactory, optimizer_factory
from velora_fx.runtime.region import CHECKPOINTED, Region, make_call
from velora_fx.runtime.stand_in import STATE, StandIn, uninstall

__all__ = [
    "CHECKPOINTED",
    "CONTEXTS",
    "COSTLY",
    "LEVELS",
    "STATE",
    "BatchWatch",
    "Checkpointed",
    "FactoredRegion",
    "Folding",
    "ModelHook",
    "Notices",
    "OptimizerFactory",
    "Recompute",
    "Region",
    "RegionPlan",
    "StandIn",
    "calibrate",
    "hooks_in",
    "install",
    "install_checkpointing",
    "make_call",
    "measured_step",
    "optimizer_factory",
    "put_back",
    "remove_carriers",
    "uninstall",
    "unwatch",
    "watch_batches",
]
