# docker build -t lidb-peft . && docker run --gpus all -v "$PWD:/data" -v hub:/hub lidb-peft personalize me.jpg
# The wheels of torch bring CUDA's libraries; of the image only the driver's side is used.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv libgl1 libglib2.0-0 \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lidb-peft
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY cli cli
COPY converters converters
COPY hypernet hypernet
COPY lidb_peft lidb_peft
COPY testbed testbed
RUN python3 -m venv /opt/hdb \
 && /opt/hdb/bin/pip install --no-cache-dir -c constraints.txt ".[eval]" \
 && cd / && /opt/hdb/bin/hdb doctor

ENV PATH=/opt/hdb/bin:$PATH HF_HOME=/hub
VOLUME /hub
WORKDIR /data
ENTRYPOINT ["hdb"]
