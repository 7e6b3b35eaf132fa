# syntax=docker/dockerfile:1
# dwrl_fast for NVIDIA GPUs, with the versions of constraints.txt. docs/install.md shows how it is built and used.
#
# The base has what the driver needs and no CUDA toolkit: PyTorch's packages bring CUDA 13.0's libraries, and Triton's
# package the compiler of its kernels. Triton also compiles a small C module at its first launch, so gcc and the headers
# of Python stay in the image.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS build
# Versions are not pinned here: Ubuntu's archive keeps the newest one only.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/dwrl_fast
ENV PATH=/opt/dwrl_fast/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt setuptools ninja numpy torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY dwrl_fast dwrl_fast
COPY kernels kernels
RUN pip install --no-cache-dir -c constraints.txt --no-build-isolation ".[qlora,agreement]" \
    && python -m dwrl_fast.ops.extension

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev python3.12-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/dwrl_fast /opt/dwrl_fast

# The owner of what a run writes to a mounted folder: `--build-arg UID=$(id -u)` makes it you.
ARG UID=1000
RUN useradd --non-unique --uid "${UID}" --create-home dwrl && install -d -o dwrl /cache /work
ENV PATH=/opt/dwrl_fast/bin:$PATH HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
USER ${UID}
VOLUME /cache
WORKDIR /work

# No port is exposed, and no command of dwrl_fast listens on one; torchrun's own meeting point is on the loopback device.
ENTRYPOINT ["python", "-m"]
CMD ["dwrl_fast.train", "--help"]
