//! `swat doctor`: what this machine and this build can do.

use super::{Common, plan, print_json, print_line};
use crate::error::Result;
use crate::report::format::bytes;
use clap::Args;
use serde_json::json;

/// Device, driver, kernels in this build, cores, memory, disk
#[derive(Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    common: Common,
}

impl Doctor {
    pub(super) fn run(self) -> Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let memory = plan::free_memory();
        let disk = fs4::available_space(".").ok();
        let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
        let driver = driver.as_deref().and_then(|t| t.lines().next()).map(str::to_owned);
        let nvcc = std::env::var_os("PATH")
            .and_then(|paths| std::env::split_paths(&paths).map(|p| p.join("nvcc")).find(|p| p.is_file()));
        let simd = simd();
        if self.common.json {
            return print_json(&json!({
                "version": env!("CARGO_PKG_VERSION"), "cores": cores, "simd": simd, "free_memory_bytes": memory,
                "free_disk_bytes": disk, "cuda_driver": driver, "cuda_kernels": false, "nvcc": nvcc,
            }));
        }
        print_line(&format!("swat         {}", env!("CARGO_PKG_VERSION")))?;
        print_line(&format!("cpu          {cores} cores, {simd}"))?;
        print_line(&format!("memory       {} free", memory.map_or("unknown".into(), bytes)))?;
        print_line(&format!("disk         {} free here", disk.map_or("unknown".into(), bytes)))?;
        print_line(&format!("CUDA driver  {}", driver.as_deref().unwrap_or("none")))?;
        print_line("CUDA kernels not in this build: everything runs on the CPU")?;
        print_line(&format!("nvcc         {}", nvcc.map_or("none".into(), |p| p.display().to_string())))
    }
}

/// The widest vector instructions that the CPU backend's loops will use here.
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
