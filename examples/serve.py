"""Serve a tuned model through `transformers serve`: an OpenAI-compatible endpoint.

    python examples/serve.py runs/mine --port 8000
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "runs/mine", "messages": [{"role": "user", "content": "Hello"}]}'

The server loads models by `from_pretrained`, which does not know results of `rosakit tune`, and has
no place to register others. So this script loads the result itself and puts it among the models
that the server holds as loaded; everything else is the server's own. Needs
``pip install 'transformers[serving]'``.
"""

from __future__ import annotations

import argparse

try:
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
except ImportError as error:
    raise SystemExit(f"{error}; serving needs: pip install 'transformers[serving]'") from error

from rosakit.tuning.result import load_any


def main() -> None:
    """Load the model, start the server, and wait until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="result of rosakit tune, or a saved adapter")
    parser.add_argument("--base", help="base model of a saved adapter, or of a result if it moved")
    parser.add_argument("--name", help="model name in requests; the first argument by default")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    model, tokenizer = load_any(args.model, base=args.base, device=args.device, dtype=args.dtype)
    key = ModelManager.process_model_name(args.name or args.model)
    server = Serve(host=args.host, port=args.port, non_blocking=True, device=str(model.device))
    server._model_manager.loaded_models[key] = TimedModel(
        model, timeout_seconds=-1, processor=tokenizer
    )
    print(f"{key.removesuffix('@main')} at http://{args.host}:{args.port}/v1", flush=True)
    try:
        server._thread.join()
    except KeyboardInterrupt:
        server.kill_server()


if __name__ == "__main__":
    main()
