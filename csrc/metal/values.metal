// Blocks back to numbers: get_rows and copies to f32 and f16. One thread per eight coordinates; f32 values are the
// reference's to the bit.
template <typename T>
kernel void kernel_pytq_values(constant pytq_metal_values_args & args, device const char * src, device const char * rows,
                               device char * dst, threadgroup float * tab [[threadgroup(0)]],
                               uint3 tgpig [[threadgroup_position_in_grid]],
                               ushort tiitg [[thread_index_in_threadgroup]], ushort3 ntg [[threads_per_threadgroup]]) {
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
    const layout l = k_layout();
    fill_table(tab, l, tiitg, ntg.x);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int per_block = head_dim(l) / 8;
    const int item = (int) (tgpig.x * ntg.x + tiitg);
    const int byte = item % per_block, ib = item / per_block % args.blocks_per_row;
    const int i1 = item / per_block / args.blocks_per_row;
    if (i1 >= args.n1) {
        return;
    }
    const int64_t row =
        args.row_bytes
            ? (int64_t) * (device const int32_t *) (rows + i1 * args.rows_nb0 + tgpig.y * args.rows_nb1 + tgpig.z * args.rows_nb2)
            : (int64_t) i1;
    device const uchar * block = (device const uchar *) src + row * args.src_nb1 + tgpig.y * args.src_nb2 +
                                 tgpig.z * args.src_nb3 + (int64_t) ib * block_bytes(l);
    device T * out = (device T *) (dst + i1 * args.dst_nb1 + tgpig.y * args.dst_nb2 + tgpig.z * args.dst_nb3) +
                     (int64_t) ib * head_dim(l) + 8 * byte;
    float4 lo, hi;
    unpack8(block, byte, l, tab, lo, hi);
    const float factor = factor_of(block, l, group_of(l, byte));
    lo *= factor, hi *= factor;
    PYTQ_UNROLL for (int i = 0; i < 4; i++) {
        out[i] = (T) lo[i];
        out[4 + i] = (T) hi[i];
    }
}

typedef decltype(kernel_pytq_values<float>) kernel_pytq_values_t;
template [[host_name("kernel_pytq_values_f32")]] kernel kernel_pytq_values_t kernel_pytq_values<float>;
template [[host_name("kernel_pytq_values_f16")]] kernel kernel_pytq_values_t kernel_pytq_values<half>;

// Contiguous blocks, byte for byte; 16 bytes a thread.
kernel void kernel_pytq_copy(constant pytq_metal_copy_args & args, device const uchar * src, device uchar * dst,
                             uint3 tgpig [[threadgroup_position_in_grid]],
                             ushort tiitg [[thread_index_in_threadgroup]], ushort3 ntg [[threads_per_threadgroup]]) {
    const uint64_t begin = 16 * ((uint64_t) tgpig.x * ntg.x + tiitg);
    const uint64_t end = min(begin + 16, args.n_bytes);
    for (uint64_t i = begin; i < end; i++) {
        dst[i] = src[i];
    }
}
