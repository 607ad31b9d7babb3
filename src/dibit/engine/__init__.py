"""One forward pass: what is running, whose memory a tensor lies in, which residual it gets, what is booked."""
