"""Checks that a stage fits into memory, by lower bounds, before anything slow starts.

Activations are not counted, since they depend on rematerialization and micro-batches: a stage that
passes can still be too large, but one that is rejected could not have run.
"""

from jaxrl_eff.core import Step
from jaxrl_eff.parallel import devices as hardware
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.train import memory as footprint
from jaxrl_eff.train.settings import StageSettings


def check_batch(s: StageSettings, sampling: Sampling | None) -> None:
    """Compares the tokens of a step with the memory of this machine.

    Every process draws and encodes all examples of a batch, and holds two 4-byte numbers per token:
    ids and masks. Rollouts have at least tokens, masks and log-probabilities, over all devices
    together.

    Raises:
        ValueError: the message names the batch.
    """
    import jax

    memory = hardware.host_memory_bytes()
    if memory is None:
        return
    length = s.data.prompt_length if sampling else s.data.length
    need, what = 8 * s.batch * max(length, 1), f"rows of {length} tokens"
    if need <= memory and sampling:
        room = _of_all_devices(jax.devices())
        longest = length + sampling.max_tokens
        rolled = 12 * s.batch * sampling.samples * longest
        if room is not None and rolled > room:
            need, memory = rolled, room
            what = f"prompts with {sampling.samples} responses of {longest} tokens"
    if need > memory:
        raise ValueError(
            f"batch is {s.batch}: that many {what} take {_size(need)} at least, and there is "
            f"{_size(memory)} of memory."
        )


def check_models(step: Step) -> None:
    """Compares parameters, optimizer states and gradients with the memory of their devices.

    Raises:
        ValueError: the message names the role with the largest share.
    """
    import jax

    held: dict[int, int] = {}
    largest: dict[int, tuple[int, str]] = {}
    for role in step.graph.models:
        place = step.plan[step.graph.home(role).name]
        if place.offload:  # partly in host memory
            continue
        mine = footprint.planned(step, role)
        size = mine.parameters + mine.state
        for device in place.devices:
            held[device] = held.get(device, 0) + size
            largest[device] = max(largest.get(device, (0, "")), (size, role))
    devices = jax.devices()
    for device, size in sorted(held.items(), key=lambda x: -x[1])[:1]:
        room, whose = hardware.memory_bytes(devices[device]), f"device {device} has"
        if devices[device].platform == "cpu":  # one memory for all of a process
            mine = devices[device].process_index
            size = sum(n for d, n in held.items() if devices[d].process_index == mine)
            whose = "this machine has"
        if room is not None and size > room:
            role = largest[device][1]
            raise ValueError(
                f"models and optimizers take {_size(size)} at least, most of it {role}'s "
                f"({_size(largest[device][0])} a device), but {whose} {_size(room)}: a smaller "
                "model, a plan that shards it (fsdp, tensor), or fewer trained parameters fit."
            )


def _of_all_devices(devices: list) -> int | None:
    """Returns the memory of all devices; simulated devices of a process share one memory."""
    if devices[0].platform == "cpu":
        memory = hardware.host_memory_bytes()
        return None if memory is None else memory * len({d.process_index for d in devices})
    memory = hardware.memory_bytes(devices[0])
    return None if memory is None else memory * len(devices)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
