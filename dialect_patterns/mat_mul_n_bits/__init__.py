"""The MatMulNBits operator of com.microsoft 1."""
