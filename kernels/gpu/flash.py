"""Which flash attention runs behind torch's `varlen_attn`: torch's own (FA2), FA3 on Hopper, FA4 on Blackwell.

Not run on a GPU. Nothing is compiled or downloaded here: torch's switch puts an installed package behind its operation.
"""

import importlib.util

import torch

# Per major compute capability: torch's name, the module that torch imports for it, and what installs that.
_PACKAGES = {
    9: ("FA3", "flash_attn_interface", "flash-attn-3, built from the hopper/ folder of Dao-AILab/flash-attention"),
    10: ("FA4", "flash_attn.cute.interface", "flash-attn-4"),
}


def flash_choice(major: int, installed: bool) -> tuple[str | None, str]:
    """Name for torch's switch (None: torch's own FA2) on GPUs of this major compute capability, and why."""
    if major not in _PACKAGES:
        return None, f"FA2: newer kernels are for SM 9 and 10, this is SM {major}"
    name, module, package = _PACKAGES[major]
    if not installed:
        return None, f"FA2: {name} is for this GPU, but there is no module {module}; it comes with {package}"
    return name, f"{name}: made for SM {major}, and installed"


def activate_flash(device: torch.device) -> str:
    """Switch torch's flash attention to the best that works on this GPU, for the whole process; says which and why."""
    from torch.nn.attention import activate_flash_attention_impl

    major, _ = torch.cuda.get_device_capability(device)
    if major not in _PACKAGES:
        return flash_choice(major, installed=False)[1]
    name, module, _ = _PACKAGES[major]
    try:
        chosen, reason = flash_choice(major, _is_installed(module))
        if chosen is not None:
            activate_flash_attention_impl(chosen)
    except Exception as error:  # a broken package raises whatever it likes; the run can do without
        return f"FA2: {name} is for this GPU, but its module {module} is broken: {type(error).__name__}: {error}"
    return reason


def why_no_pages() -> str | None:
    """Why the active flash attention cannot read keys and values in blocks of 16; None if it can.

    FA2 wants pages of a multiple of 256 positions; FA3 takes any on SM 9, FA4 any on SM 10 and none elsewhere.
    """
    from torch.nn.attention import current_flash_attention_impl

    if current_flash_attention_impl() in {name for name, _, _ in _PACKAGES.values()}:
        return None
    return "paged decoding needs FA3 or FA4: the pages of FA2 are 256 positions, ours are 16"


def _is_installed(module: str) -> bool:
    parts = module.split(".")
    parents = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return all(importlib.util.find_spec(name) is not None for name in parents)
