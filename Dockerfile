# hra-export for NVIDIA GPUs:
#     docker build --tag hra-export .
#     docker run --rm --gpus all --volume "$PWD:/work" --volume hra-export-cache:/cache hra-export merge runs/adapter --output merged
# Without a GPU:
#     docker build --tag hra-export:cpu --build-arg BASE=ubuntu:24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .

# CUDA 13.0 and cuDNN 9: what both onnxruntime-gpu 1.31 and torch 2.13 are built for, and the oldest drivers they take.
ARG BASE=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

FROM ${BASE} AS python
# Ubuntu serves the newest build of a package only: an exact version would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3.12 \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
# torch first: it is nearly all of the download, and changes least often.
COPY constraints.txt ./
ARG TORCH_INDEX=https://pypi.org/simple
RUN python3.12 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" torch setuptools
COPY pyproject.toml README.md LICENSE ./
COPY hra_export hra_export
COPY converters converters
# The same sources make the same wheel: no time of building in it.
ENV SOURCE_DATE_EPOCH=315532800
RUN /opt/venv/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheel .
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" \
    "$(echo /opt/wheel/hra_export-*.whl)[diffusers,genai,gguf,train]"
# Kernels for ONNX Runtime, beside the package; their compilers stay out of the image.
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps --target /opt/tools \
    cmake ninja nvidia-cuda-cccl nvidia-cuda-crt nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-nvvm
RUN PATH=/opt/tools/bin:${PATH} PYTHONPATH=/opt/tools /opt/venv/bin/hra-export build-op --cuda on

FROM python
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="hra-export" \
    org.opencontainers.image.description="Train, fold, validate and ship Householder Reflection Adaptation (HRA) adapters." \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.licenses="Apache-2.0"
# Ubuntu's own user has the id 1000. /cache is for everyone: `docker run --user` may name any id.
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --user-group --create-home hra \
    && install --directory --mode=1777 /cache \
    && install --directory --owner=hra --group=hra /work
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    HF_HOME=/cache \
    XDG_CACHE_HOME=/cache
USER 1000:1000
WORKDIR /work
RUN hra-export --version
VOLUME ["/cache"]
ENTRYPOINT ["hra-export"]
CMD ["--help"]
