"""What must hold on a device, run on every one that is there: the CPU proves that the tests work.

``pytest tests/gpu -m gpu`` is all that needs a CUDA device. Nothing here needs TorchServe or what
only development needs, so that it runs on a machine that has little more than torch.
"""
