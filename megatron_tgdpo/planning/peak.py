"""The most that a GPU computes, by its name."""

# Dense bf16 products, TFLOP/s, by a part of the device's name; the first that is there. None: a form of the device with
# another peak than its namesake's, which is not known here. Source: NVIDIA's data sheets.
H100_TFLOPS = 989.0
BF16_TFLOPS: dict[str, float | None] = {
    "H100 PCIe": 756.0,
    "NVL": None,
    "H100": H100_TFLOPS,
    "H200": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
}
# Of those that have FP8 products: twice as many.
_WITH_FP8 = ("H100", "H200", "B200")


def peak_tflops(device_name: str, precision: str = "bf16") -> float | None:
    """Dense peak of a GPU, TFLOP/s; None where it is not known.

    Args:
        device_name: As torch has it.
        precision: ``bf16`` or ``fp8``; others are not known.
    """
    peak = next((peak for part, peak in BF16_TFLOPS.items() if part in device_name), None)
    if precision == "bf16" or peak is None:
        return peak if precision == "bf16" else None
    return 2 * peak if precision == "fp8" and any(part in device_name for part in _WITH_FP8) else None
