"""What lets the same training code run on this machine.

- `compat`: adapters between NeMo 2.7.3 and Megatron-Core 0.16.1, each behind a probe.
- `cpu`: CUDA calls carried out on the CPU, only where there is no CUDA device.
- `strategy`: the Megatron strategy that installs both and refuses what would go wrong.
- `preflight`: the refusals.
- `groups`: Megatron's parallel groups on a process that stands alone.
- `checkpoint`, `progress`: checkpoints that survive a kill, and what a run prints.
- `checkpoint_folder`: where they lie, found without importing anything heavy.
"""
