"""The engine on Megatron-Core. Import `MegatronEngine` from `.engine`."""

import warnings

# Megatron-Core tells every process, each time, of optional GPU libraries that are absent and of its own old names.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
