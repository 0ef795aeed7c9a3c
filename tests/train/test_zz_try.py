import time
def test_a(config, trained, logged):
    for _ in range(3):
        t=time.time(); c=config("data.prefetch=3"); print("load", time.time()-t)
        t=time.time(); x=trained(c); print("train", time.time()-t)
        print(x.output)
    print(logged(x.run.directory, measured=True)[-1])
    print(x.run.tokenizer.vocab_size, x.metrics)
