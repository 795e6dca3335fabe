import sys, collections, traceback, random, warnings
import torch
from jaxtyping import config
config.update("jaxtyping_disable", True)
from tests.fuzz import cases as C
from tests.fuzz.tensors import *
rng=random.Random(int(sys.argv[1])); n=int(sys.argv[2]); which=sys.argv[3]; only=sys.argv[4] if len(sys.argv)>4 else ""
warnings.simplefilter("error")
found=collections.defaultdict(list)
NAMES=["batch","classes","width","channels","height","columns","teacher width","teacher height","teacher columns","members","directions","colours","landmarks","heads","length","database","words"]
def sizes(case):
    d={k:rng.randint(1,4) for k in NAMES}
    for k,v in case.least.items(): d[k]=max(d[k],v)
    return C.sizes_of(**d)
def draw(case, finite=False):
    return Draw(rng.choice(list(PATTERNS)), rng.choice([0,0,12,-12,rng.randint(-12,12)]), rng.choice(list(LAYOUTS)), rng.choice(case.dtypes), rng.choice(INTEGERS), rng.random()<.5, rng.randint(0,7))
for case in C.LOSSES+C.ESTIMATORS:
    if only and only not in case.title: continue
    for _ in range(n):
        s=sizes(case); dt=draw(case)
        ds={name:draw(case) for name in case.kinds}
        if which!="mixed":
            import dataclasses
            ds={k:dataclasses.replace(d,dtype=dt.dtype) for k,d in ds.items()}
        ctx=rng.choice(list(CONTEXTS))
        args={name:C.tensor(kind,s,ds[name]) for name,kind in case.kinds.items()}
        for name in case.needs: args[name].requires_grad_(True); ctx="gradient"
        mut=None
        if which=="wrong":
            name=rng.choice(list(args)); m=rng.choice(list(MUTATIONS)); mut=(name,m)
            args[name]=mutated(args[name],m)
            if isinstance(args[name],torch.Tensor) and name in case.needs and args[name].is_floating_point(): args[name].requires_grad_()
        info=(case.title,{k:v for k,v in s.items()} if 0 else None,mut,ctx,[ (d.pattern,d.exponent,d.layout,str(d.dtype)) for d in ds.values()],s["batch"])
        f=case.function(s)
        w=Watched(args)
        try:
            with CONTEXTS[ctx](): r=f(**args)
        except Exception as e:
            if which in("wrong","wild"):
                if documented(e,case.argument_names()): 
                    try: w.check()
                    except AssertionError as e2: found[case.of.__name__,"inplace"].append(info)
                    continue
            found[case.of.__name__,type(e).__name__,__import__("re").sub(r"\d+","#",str(e))[:100]].append(info); continue
        try: w.check()
        except AssertionError as e: found[case.of.__name__,str(e)].append(info)
        f32 = dt.dtype in (torch.float32,torch.float64) and all(d.dtype in (torch.float32,torch.float64) for d in ds.values())
        outs=[o for o in tensors_of(r)]
        ptrs={a.untyped_storage().data_ptr() for a in args.values() if isinstance(a,torch.Tensor) and a.numel()}
        if not case.shares and any(o.numel() and o.untyped_storage().data_ptr() in ptrs for o in outs): found[case.of.__name__,"alias"].append(info)
        if f32 and not case.unbounded and not all(o.isfinite().all() for o in outs): found[case.of.__name__,"value not finite"].append(info)
        if isinstance(r,float) and not r==r: found[case.of.__name__,"value nan"].append(info)
        if ctx=="gradient" and which!="wrong":
            try: g=backward(r,args)
            except Exception as e: found[case.of.__name__,"backward",type(e).__name__,str(e)[:90]].append(info); continue
            for k,v in g.items():
                if k in case.constant and v is not None: found[case.of.__name__,"gradient into",k].append(info)
                if v is not None and f32 and not v.isfinite().all(): found[case.of.__name__,"gradient not finite",case.title,k].append(info)
                if v is None and k not in case.constant and case in C.LOSSES: found[case.of.__name__,"no gradient",k].append(info)
            try: w.check()
            except AssertionError as e: found[case.of.__name__,"after backward "+str(e)].append(info)
for k,v in found.items(): print(len(v),k,v[0][0][:40],sorted({str(i[2]) for i in v})[:6],v[0][3:])
