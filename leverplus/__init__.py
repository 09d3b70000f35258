__version__ = "0.1.0"

import warnings
# what fastai's own imports say to nobody who could act on it
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", module="torch.jit")
warnings.filterwarnings(
    "ignore", message="The 'mode.chained_assignment' option is deprecated", module="fastai"
)
