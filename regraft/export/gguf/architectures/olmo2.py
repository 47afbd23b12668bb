"""olmo2: OLMo 2, with norms behind the branches."""

from ..architecture import GGUFArchitecture

architecture = GGUFArchitecture(
    name="olmo2", families=("olmo2",), names="OLMO2", square=True, own_head=True
)
