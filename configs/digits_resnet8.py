from configs import base


def get_config(arg: str = ""):
    config = base.get_config()
    return config
