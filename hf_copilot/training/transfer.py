"""Between the CPU and an accelerator without a wait: pinned memory, and an event that is looked at before use."""

from __future__ import annotations

from collections.abc import Mapping

import torch

GPU = "cuda"  # the kind of device whose copies go on while the CPU does


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor there; the CPU does not wait for what is sent to a GPU."""
    is_sent = torch.device(device).type == GPU and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if is_sent else tensor.to(device)


class Transfer:
    """Tensors on their way to a device. What comes from a GPU to the CPU is not to be read before [`arrived`]."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"):
        self.tensors = {name: self.send(tensor, device) for name, tensor in tensors.items()}
        is_read = torch.device(device).type == "cpu"
        sources = {tensor.device for tensor in tensors.values() if is_read and tensor.device.type == GPU}
        self.events = [torch.cuda.current_stream(source).record_event() for source in sources]

    @staticmethod
    def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """Begin to copy it; on the CPU it gets pinned memory, which a GPU writes to by itself."""
        is_read = tensor.device.type == GPU and torch.device(device).type == "cpu"
        return tensor.to(device, non_blocking=True) if is_read else to_device(tensor, device)

    def arrived(self) -> dict[str, torch.Tensor]:
        """The tensors there, once what the GPU was doing when they were sent is done."""
        for event in self.events:
            event.synchronize()
        self.events = []
        return self.tensors
