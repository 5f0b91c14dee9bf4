# One image to serve and to train adapters on a GPU node: docs/deployment.md.
# The CUDA libraries come with torch's wheels, the driver from the node. For a CPU: LOCK=requirements/cpu.lock.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Triton and torch.compile call a C compiler at run time, the CPU kernels are compiled below; tini hands signals on and
# reaps what is left behind.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libc6-dev tini \
 && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 chorus \
 && useradd --uid 10001 --gid chorus --no-create-home --home-dir /cache --shell /usr/sbin/nologin chorus \
 && install -d -o chorus -g chorus /adapters /cache /store

WORKDIR /app
ARG LOCK=requirements/gpu.lock
# More arguments for pip, as in the Makefile.
ARG PIP_ARGS=""
COPY ${LOCK} /app/lock.txt
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --disable-pip-version-check --no-cache-dir ${PIP_ARGS} -r lock.txt
ENV PATH=/opt/venv/bin:$PATH

COPY pyproject.toml README.md LICENSE /app/
COPY models /app/models
COPY adapters /app/adapters
COPY kernels /app/kernels
COPY server /app/server
COPY training /app/training
COPY deploy/healthcheck.py /app/deploy/healthcheck.py
# Editable, since the demo base, the corpora and the bundled adapters are found beside the code. Files that only the
# builder could read, as training writes its weights, are opened to the image's user.
RUN pip install --disable-pip-version-check --no-cache-dir ${PIP_ARGS} --no-deps -e . \
 && python -m kernels.build \
 && python -m compileall -q server adapters kernels training \
 && find /app ! -perm -o=r -exec chmod a+rX {} +

# Whatever is written at run time goes to /adapters, /store, /cache and /tmp; the rest of the image may be read-only.
ENV CHORUS_MODEL=openai-community/gpt2-medium \
    CHORUS_ADAPTERS_DIR=/adapters \
    CHORUS_STORE_DIR=/store \
    CHORUS_HOST=0.0.0.0 \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    XDG_CACHE_HOME=/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/adapters", "/cache", "/store"]
EXPOSE 8000
USER 10001:10001
STOPSIGNAL SIGTERM
# The first start downloads the model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["python", "/app/deploy/healthcheck.py"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "server"]
