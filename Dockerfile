# docker build -t na-lora .   and then   docker run --gpus all -v "$PWD:/runs" na-lora fit --config run.yaml
# Files that are written belong to who runs it with: docker run --user "$(id -u):$(id -g)" ...
# Built with buildah, on a stand-in for the base image: Debian 12 with its Python 3.11.
FROM python:3.12-slim

WORKDIR /package
COPY pyproject.toml constraints.txt README.md CHANGELOG.md LICENSE ./
COPY configs configs
COPY na_lora_lightning na_lora_lightning
RUN pip install --no-cache-dir -c constraints.txt '.[quantization]'

# Models of the hub are kept where a volume can be.
ENV HF_HOME=/runs/.cache/huggingface
WORKDIR /runs
ENTRYPOINT ["na-lora"]
CMD ["--help"]
