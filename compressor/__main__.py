from compressor.cli.app import app

app(prog_name="compressor")
