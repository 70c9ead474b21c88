# The command `rebasin` on CPU, or with --build-arg TORCH=cu128 on CUDA; see docs/installation.md.
FROM python:3.13-slim AS build
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
# torch first: a change of the package leaves this layer, by far the largest, as it is.
RUN python -m venv /opt/rebasin \
    && /opt/rebasin/bin/pip install "torch>=2.11,<2.14" --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY rebasin rebasin
RUN /opt/rebasin/bin/pip install .

FROM python:3.13-slim
RUN useradd --create-home --uid 1000 rebasin
COPY --from=build /opt/rebasin /opt/rebasin
ENV PATH=/opt/rebasin/bin:$PATH REBASIN_CACHE=/home/rebasin/.cache/rebasin WANDB_MODE=offline
USER 1000
WORKDIR /work
ENTRYPOINT ["rebasin"]
CMD ["--help"]
