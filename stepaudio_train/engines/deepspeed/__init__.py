"""The engine on DeepSpeed's ZeRO. Import `DeepSpeedEngine` from `.engine`."""

import warnings

# DeepSpeed calls torch by its older names, and is told so at every step.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
