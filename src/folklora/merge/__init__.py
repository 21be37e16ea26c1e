"""Many models into one: a method is a function of the tensors of one name; `contract.py` says what of.

`folklora.merge.factors` merges adapters in LoRA's form without building their dense updates. `folklora.merge.twins`
serves what `twin_merging` splits, by a router. `DynamicLogitFusion` joins models not by their weights but by what they
say next, while they decode. `FusionX` trains one model on what others, with tokenisers of their own, say next.
"""

from folklora.merge.average import average
from folklora.merge.breadcrumbs import breadcrumbs, breadcrumbs_ties
from folklora.merge.contract import PerTask
from folklora.merge.dare import dare_linear, dare_ties
from folklora.merge.della import della, della_linear
from folklora.merge.dynamic_logit_fusion import DynamicLogitFusion
from folklora.merge.emr import common_scale, emr
from folklora.merge.fisher import fisher
from folklora.merge.fusion_x import FusionX
from folklora.merge.iso_c import iso_c
from folklora.merge.karcher import karcher
from folklora.merge.model_stock import model_stock
from folklora.merge.nearswap import nearswap
from folklora.merge.nuslerp import nuslerp
from folklora.merge.passthrough import passthrough
from folklora.merge.r_tsvm import r_tsvm
from folklora.merge.ram import ram
from folklora.merge.regmean import regmean
from folklora.merge.sce import sce
from folklora.merge.slerp import slerp
from folklora.merge.tall import consensus, tall
from folklora.merge.task_arithmetic import task_arithmetic
from folklora.merge.ties import ties
from folklora.merge.tsv_c import tsv_c
from folklora.merge.tsv_m import tsv_m
from folklora.merge.twin_merging import twin_merging
from folklora.merge.wudi import wudi, wudi_closed_form

__all__ = [
    "DynamicLogitFusion",
    "FusionX",
    "PerTask",
    "average",
    "breadcrumbs",
    "breadcrumbs_ties",
    "common_scale",
    "consensus",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "emr",
    "fisher",
    "iso_c",
    "karcher",
    "model_stock",
    "nearswap",
    "nuslerp",
    "passthrough",
    "r_tsvm",
    "ram",
    "regmean",
    "sce",
    "slerp",
    "tall",
    "task_arithmetic",
    "ties",
    "tsv_c",
    "tsv_m",
    "twin_merging",
    "wudi",
    "wudi_closed_form",
]
