"""Where does a coordinator listen unless it is told otherwise?"""

from __future__ import annotations

HTTP = "127.0.0.1:8000"
"""The OpenAI API."""
GRPC = "127.0.0.1:50051"
"""The gRPC API."""
