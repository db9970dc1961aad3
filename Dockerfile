# Two stages: pip stays in the first, and the image that runs has neither it nor its cache.
FROM python:3.12-slim AS build
WORKDIR /build
RUN python -m venv /venv
COPY requirements.txt .
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check -r requirements.txt \
 && /venv/bin/pip uninstall --yes --quiet pip

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin audit
COPY --from=build /venv /venv
WORKDIR /app
COPY alembic.ini ./
COPY alembic alembic
COPY edge edge
COPY housekeeping housekeeping
COPY ingest ingest
COPY keys keys
COPY ledger ledger
COPY proofs proofs
COPY queries queries
COPY routes routes
COPY verifier verifier
COPY *.py ./
# Compiled now, for the file system is read-only later.
RUN python -m compileall -q /app
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    PORT=8000
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
CMD ["python", "cli.py", "serve"]
