# The public names of regraft and where each is defined: the only list of them.
# Type checkers and editors read this file; regraft/__init__.py reads it too, to import a name
# when it is first used.

from .checks.check import check as check
from .core.checkpoint import Checkpoint as Checkpoint
from .errors import RegraftError as RegraftError
from .evaluation.evaluate import evaluate_recall as evaluate_recall
from .evaluation.evaluate import evaluate_tasks as evaluate_tasks
from .growth.steps.bridge import Bridge as Bridge
from .growth.steps.composable import AddHeads as AddHeads
from .growth.steps.composable import AddLayers as AddLayers
from .growth.steps.composable import GrowHeadDim as GrowHeadDim
from .growth.steps.composable import GrowHeadValues as GrowHeadValues
from .growth.steps.composable import GrowHidden as GrowHidden
from .growth.steps.composable import GrowMLP as GrowMLP
from .growth.steps.composable import GrowQueryKeys as GrowQueryKeys
from .growth.steps.deepen import Deepen as Deepen
from .growth.steps.transplant import Transplant as Transplant
from .growth.steps.widen import Widen as Widen
from .linearize.merge import Merge as Merge
from .mixers.remix import Remix as Remix
from .modeling import flops as flops
from .modeling.generate import generate as generate
from .modeling.loading import load as load
from .plan.plan import Plan as Plan
from .recipes.run import run_recipe as run_recipe
from .recipes.schema import Recipe as Recipe

__version__: str

def open(path: str) -> Checkpoint: ...
