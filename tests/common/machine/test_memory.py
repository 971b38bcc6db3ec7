"""Running out of memory is one sentence with the batch and what to lower; other errors propagate."""

import errno

import pytest
import torch

from common.errors import UserError
from common.machine import memory

CPU = torch.device("cpu")
BATCH = {"ids": [7, 8], "images": torch.zeros(2, 3, 8, 9), "labels": torch.zeros(5), "files": ["a.jpg", "b.jpg"]}


def test_the_message_names_shapes_samples_device_and_remedy() -> None:
    with pytest.raises(UserError) as caught, memory.report_out_of_memory("Step 12", BATCH, CPU, memory.TRAINING_ADVICE):
        torch.empty(10**15)
    message = str(caught.value)
    shapes = "images (2, 3, 8, 9), labels (5,) of samples 7, 8"
    assert message.startswith(f"Step 12 ran out of memory on the cpu with {shapes}: lower trainer.micro_batch")
    assert message.endswith("trainer.precision=bf16.") and "\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_every_kind_of_out_of_memory_error_is_recognised(error: Exception) -> None:
    with (
        pytest.raises(UserError, match=r"^Evaluation ran out of memory"),
        memory.report_out_of_memory("Evaluation", BATCH, CPU, "x"),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        UserError("a.jpg is broken."),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_propagate_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, memory.report_out_of_memory("Step 1", BATCH, CPU, "x"):
        raise error
    assert caught.value is error


def test_of_many_samples_only_the_first_are_listed() -> None:
    batch = {"ids": [*range(50)], "rows": torch.zeros(50)}
    assert memory.describe(batch) == "rows (50,) of samples 0, 1, 2, 3 and 46 more"


def test_for_a_batch_of_one_sample_the_advice_is_a_smaller_sample() -> None:
    batch = {"ids": ["a.jpg"], "images": torch.zeros(1, 3, 9, 9)}
    with pytest.raises(UserError) as caught, memory.report_out_of_memory("Step 1", batch, CPU, memory.TRAINING_ADVICE):
        raise MemoryError
    assert "of sample a.jpg: one sample alone is too much" in str(caught.value)
    assert "micro_batch" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_message_names_a_gpu_and_its_memory_in_use() -> None:
    gpu = torch.device("cuda", 0)
    message = (
        rf"^Step 3 ran out of memory on {torch.cuda.get_device_name(gpu)} \([\d.]+ of [\d.]+ GiB in use\) with images"
    )
    with (
        pytest.raises(UserError, match=message),
        memory.report_out_of_memory("Step 3", BATCH, gpu, memory.TRAINING_ADVICE),
    ):
        torch.empty(10**15, device=gpu)
