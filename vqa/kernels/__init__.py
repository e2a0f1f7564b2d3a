"""Operations behind the layers: `modulate` (in C++ or plain torch operations) and the frozen convolution."""
