//! `swat doctor`: capabilities of the machine and the build.

use super::common::{Common, print_json, print_line};
use crate::backend::FreeMemory;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Cuda, F32State};
use crate::error::Result;
use crate::report::format::bytes;
use clap::Args;
use serde_json::json;
use std::collections::BTreeMap;

/// Device, driver, kernels in this build, cores, memory, disk
#[derive(Args)]
pub(super) struct Doctor {}

impl Doctor {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let memory = FreeMemory::now();
        let disk = fs4::available_space(".").ok();
        let cuda = cuda::survey();
        let nvcc = std::env::var_os("PATH")
            .and_then(|paths| std::env::split_paths(&paths).map(|p| p.join("nvcc")).find(|p| p.is_file()));
        let (simd, amx, bf16) = (simd(), Cpu::matrix_unit(), Cpu::bf16_products());
        let gpus: Vec<_> = (0..*cuda.devices.as_ref().unwrap_or(&0)).map(|ordinal| (ordinal, gpu(ordinal))).collect();
        if common.json {
            let gpus: Vec<_> = gpus.iter().map(|(ordinal, gpu)| match gpu {
                Ok(gpu) => json!({ "device": format!("cuda:{ordinal}"), "name": gpu.name, "free_bytes": gpu.free, "total_bytes": gpu.total,
                    "capability": format!("{}.{}", gpu.capability.0, gpu.capability.1) }),
                Err(e) => json!({ "device": format!("cuda:{ordinal}"), "error": e.to_string() }),
            }).collect();
            return print_json(&json!({
                "version": env!("CARGO_PKG_VERSION"), "cores": cores, "simd": simd, "amx": amx, "bf16_products": bf16, "free_memory_bytes": memory.as_ref().map(|m| m.bytes), "memory_bound": memory.as_ref().map(|m| &m.bound),
                "free_disk_bytes": disk, "cuda_images": cuda.images, "cuda_devices": gpus,
                "cuda_driver": cuda.devices.as_ref().map_or_else(|why| json!({ "error": why }), |count| json!({ "devices": count })),
                "nvcc": nvcc,
            }));
        }
        print_line(concat!("swat         ", env!("CARGO_PKG_VERSION"), env!("SWAT_COMMIT")))?;
        let products = [(amx, ", AMX for large products"), (bf16, ", AVX-512 BF16 for products of bf16")];
        let products: String = products.iter().filter(|(there, _)| *there).map(|(_, text)| *text).collect();
        print_line(&format!("cpu          {cores} cores, {simd}{products}"))?;
        let memory =
            memory.map_or("unknown".into(), |free| format!("{} free, bounded by {}", bytes(free.bytes), free.bound));
        print_line(&format!("memory       {memory}"))?;
        print_line(&format!("disk         {} free here", disk.map_or("unknown".into(), bytes)))?;
        let size = cuda.images.iter().map(|image| image.bytes as u64).sum();
        match cuda.images.is_empty() {
            true => print_line("CUDA kernels none in this build: everything runs on the CPU")?,
            false => print_line(&format!("CUDA kernels {} in {} files", bytes(size), cuda.images.len()))?,
        }
        let mut by_code: BTreeMap<&[&str], Vec<&str>> = BTreeMap::new();
        for image in &cuda.images {
            by_code.entry(image.architectures).or_default().push(image.stem);
        }
        for (code, stems) in by_code {
            print_line(&format!("             {}: {}", code.join(" "), stems.join(", ")))?;
        }
        print_line(&match &cuda.devices {
            Ok(count) => format!("CUDA driver  {count} device(s)"),
            Err(why) => format!("CUDA driver  {why}"),
        })?;
        for (ordinal, gpu) in gpus {
            print_line(&match gpu {
                Ok(gpu) => format!(
                    "cuda:{ordinal}       {}, compute capability {}.{}, {} of {} free",
                    gpu.name,
                    gpu.capability.0,
                    gpu.capability.1,
                    bytes(gpu.free),
                    bytes(gpu.total)
                ),
                Err(e) => format!("cuda:{ordinal}       cannot be used: {e}"),
            })?;
        }
        print_line(&format!("nvcc         {}", nvcc.map_or("none".into(), |p| p.display().to_string())))
    }
}

/// Properties of a GPU.
struct Gpu {
    name: String,
    capability: (i32, i32),
    free: u64,
    total: u64,
}

fn gpu(ordinal: u32) -> Result<Gpu> {
    let device = Cuda::<F32State>::open(ordinal)?;
    let (free, total) = device.memory()?;
    Ok(Gpu { name: device.product()?, capability: device.capability(), free, total })
}

/// Widest vector instructions of the CPU backend on this machine.
fn simd() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx512f") {
            return "AVX-512";
        }
        if std::is_x86_feature_detected!("avx2") {
            return "AVX2";
        }
    }
    "baseline vectors"
}
