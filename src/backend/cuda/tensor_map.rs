//! Matrices as bulk tensor copies (TMA) see them.

use super::device::Device;
use super::memory::Slice;
use crate::backend::FloatElement;
use crate::error::Result;
use cudarc::driver::sys::{
    self, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as Fill, CUtensorMapInterleave as Interleave,
    CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle,
};
use half::bf16;

/// Bytes of a line of a box: all of a swizzled line. Lines of a box of C.
const LINE_BYTES: usize = 128;
const SLAB_LINES: usize = 64;

/// Lines of `columns` elements, of which a copy takes a box of `box_lines` × 128 bytes, swizzled within these as
/// `wgmma_descriptor` of `kernels/prelude_sm90.cuh` has it. Outside the matrix a box is zeros.
///
/// # Errors
/// [`crate::error::Error::Device`] where the driver refuses it: an empty or unaligned matrix, or lines that are no
/// multiple of 16 bytes.
pub(super) fn tensor_map(
    device: &Device,
    matrix: Slice<bf16>,
    columns: usize,
    box_lines: usize,
) -> Result<sys::CUtensorMap> {
    assert!(columns > 0 && matrix.len().is_multiple_of(columns), "{} elements in lines of {columns}", matrix.len());
    encode(device, matrix, [columns, matrix.len() / columns], [box_lines])
}

/// Matrices [`matrices`, `rows`, `columns`] whose boxes are slabs as `kernels/gemm_sm90.cuh` stores them: 64 rows × 128
/// bytes of one matrix, swizzled within these.
///
/// # Errors
/// As [`tensor_map`].
pub(super) fn slab_map<T: FloatElement>(
    device: &Device,
    tensor: Slice<T>,
    [columns, rows, matrices]: [usize; 3],
) -> Result<sys::CUtensorMap> {
    assert_eq!(tensor.len(), columns * rows * matrices);
    encode(device, tensor, [columns, rows, matrices], [SLAB_LINES, 1])
}

/// Dimensions from the contiguous one on; lines of a box in those after it.
fn encode<T: FloatElement, const RANK: usize, const LINES: usize>(
    device: &Device,
    tensor: Slice<T>,
    dimensions: [usize; RANK],
    box_lines: [usize; LINES],
) -> Result<sys::CUtensorMap> {
    device.context.bind()?;
    let data_type = match T::NAME {
        "bf16" => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "f32" => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        other => panic!("a tensor map of {other}"),
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let mut strides = [size_of::<T>() as u64; LINES];
    let mut extents = [(LINE_BYTES / size_of::<T>()) as u32; RANK];
    for (i, lines) in box_lines.into_iter().enumerate() {
        strides[i] *= dimensions[..=i].iter().product::<usize>() as u64;
        extents[i + 1] = lines as u32;
    }
    let (dimensions, steps) = (dimensions.map(|size| size as u64), [1; RANK]);
    // SAFETY: writes the map; every array has the entries of a tensor of this rank, and the tensor is what the slice holds.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            data_type,
            RANK as u32,
            tensor.pointer() as *mut std::ffi::c_void,
            dimensions.as_ptr(),
            strides.as_ptr(),
            extents.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|error| device.context.failed("the driver refused a tensor map", error))?;
    Ok(map)
}
